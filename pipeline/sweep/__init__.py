"""From a study to a full trial store."""
