"""The bundled model: its tasks, its data and the script that trained it."""
