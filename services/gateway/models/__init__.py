"""The models that jobs may name: settings, queues, workers, prices and tokenizers."""
