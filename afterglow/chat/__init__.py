"""One model server: the chat-completions protocol over HTTP, with the differences between those that speak it."""
