"""The embedded default backbone; README.md beside this file says how it was made and what it reached."""
