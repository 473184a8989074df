"""Weight files of other people, one module a source, and the prompt files that users share."""
