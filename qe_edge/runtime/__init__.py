"""What an app uses: a student that expands queries, and their expansions."""
