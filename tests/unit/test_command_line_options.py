"""What the command line says of an option that is in the wrong place."""

import click
import pytest

from durable_llm.cli._run import durable_llm, place_of


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--address", "x:1", "pipeline", "ls"], True),
        (["pipeline", "--address", "x:1", "ls"], True),
        (["ls", "--adress", "x:1"], False),
    ],
)
def test_an_option_before_its_command_is_told_where_it_goes(arguments: list[str], *, said: bool) -> None:
    with pytest.raises(click.NoSuchOption) as error:
        durable_llm.main(arguments, standalone_mode=False)
    assert ("Options follow the command" in place_of(error.value)) == said
