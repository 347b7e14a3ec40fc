"""What a command writes, carries on and shows."""
