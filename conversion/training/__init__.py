"""What `conversion.align` and `conversion.finetune` do: students, teachers, losses, runs and their results."""
