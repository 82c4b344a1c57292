"""Networks and operators that no library has. Imports nothing of the rest of the package."""
