"""`python -m tests.support.kafka_cluster`: run librdkafka's mock cluster of one Kafka broker until killed.

The program prints the broker's address. The broker speaks Kafka's protocol over TCP, to any client.
"""

import signal
import sys

from confluent_kafka import Producer


def main() -> None:
    """Run the broker in the threads of a librdkafka client."""
    client = Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = client.list_topics(timeout=10).brokers.values()
    sys.stdout.write(f"{broker.host}:{broker.port}\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()
