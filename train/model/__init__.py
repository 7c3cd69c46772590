"""What methods are built from: encoders, heads, teachers, queues, random draws."""
