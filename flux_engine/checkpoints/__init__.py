"""Weight files: reading them (`source`), checking and placing them (`load`), other layouts (`keys`, `export`)."""
