"""Files that appear whole or not at all, and files and documents from unknown hands, checked once at one door."""
