"""What may be sent and what comes back, in OpenAI's and vLLM's words.

A field that asks for something we do not do is an error that names it; nothing is ignored. A field
whose value asks for nothing (`suffix: ""`, `presence_penalty: 0`, any null) is fine.
"""
