"""What every part knows: errors, names, defaults and the manifest. Imports nothing of the project."""
