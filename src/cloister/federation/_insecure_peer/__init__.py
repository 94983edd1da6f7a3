"""The peer of every comparison, without any security: plain Flower, PEFT and FedAvg, in the clear, without TLS.

It exists to be compared with, and protects nothing: adapters and metrics cross the relay as they are, nobody attests
to anything, whoever reaches the port may take part. No run of cloister uses it.
"""
