"""The teacher's targets before and after the job that writes them: capture, plan, fidelity, proof, filter."""
