"""What the student learns from: SALMONN and its ears, other teachers, online and cached targets."""
