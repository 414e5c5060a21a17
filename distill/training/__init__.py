"""What a training loop needs beside the objective: micro-batches, ranks, checkpoints, signals, logs."""
