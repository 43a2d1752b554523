"""OpenAI's API as data: JSON bodies to requests, outputs to JSON bodies. It knows no engine and no server."""
