"""One attention head: who sees whom, and its rows with the tokens that count."""
