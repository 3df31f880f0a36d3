"""What every room needs: errors, command lines, files, devices and ranks."""
