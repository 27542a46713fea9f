"""Commands about the command line itself: config, completion."""

import sys

import click

from durable_llm.cli._exits import CommandError
from durable_llm.cli._options import json_option
from durable_llm.cli._profiles import SETTINGS, Profiles, config_path, settings_of
from durable_llm.cli._stdout import write, write_json, write_line, write_table


@click.group()
def config() -> None:
    """Show and change profiles: named settings in a file."""


@config.command("list")
def list_profiles() -> None:
    """List the profiles. A star marks the one in use."""
    profiles = Profiles(config_path())
    chosen = profiles.chosen()
    rows = [("*" if name == chosen else "", name, values.get("address", "")) for name, values in profiles.named.items()]
    write_table(("", "PROFILE", "ADDRESS"), rows)


@config.command()
@click.option("--profile", default="", help="Profile to show. [default: the one in use]")
@json_option
def show(*, profile: str, as_json: bool) -> None:
    """Show the settings in force, of the environment and the profile. A key itself is not shown."""
    profiles = Profiles(config_path())
    name = profiles.chosen(profile)
    settings = settings_of({}, profiles.named.get(name, {}))
    if "api_key" in settings:
        settings["api_key"] = "(set)"
    if as_json:
        write_json({"file": str(profiles.path), "profile": name, **settings})
        return
    for key, value in {"file": str(profiles.path), "profile": name, **settings}.items():
        write_line(f"{key:13}{value}")


@config.command("set")
@click.argument("setting", type=click.Choice(list(SETTINGS)))
@click.argument("value", required=False)
@click.option("--profile", default="", help="Profile to change; it need not exist. [default: the one in use]")
def set_setting(*, setting: str, value: str | None, profile: str) -> None:
    """Change a setting of a profile. An empty VALUE removes it.

    An API key is not an argument, which other users of the machine could see: it is asked for, or read from standard
    input. The command rewrites the whole file, and drops its comments.
    """
    if setting == "api_key":
        if value is not None:
            raise click.UsageError("An API key is no argument: it is asked for, or read from standard input.")
        value = click.prompt("API key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read()
        value = value.strip()
    if value is None:
        raise click.UsageError(f"Give VALUE: {SETTINGS[setting]}.")
    if not value.isprintable():
        raise click.UsageError("VALUE holds a control character.")
    profiles = Profiles(config_path())
    changed = profiles.named.setdefault(profile or profiles.chosen(), {})
    changed.pop(setting, None)
    if value:
        changed[setting] = value
    settings_of({}, changed)
    profiles.write()


@config.command()
@click.argument("profile")
def use(*, profile: str) -> None:
    """Use a profile from now on, where neither --profile nor DURABLE_LLM_PROFILE names one."""
    profiles = Profiles(config_path())
    profiles.current = profiles.chosen(profile)
    profiles.write()


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, *, shell: str) -> None:
    """Print a script that completes this command in a shell.

    \b
    bash:  eval "$(durable-llm completion bash)"
    zsh:   eval "$(durable-llm completion zsh)"
    fish:  durable-llm completion fish | source
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise CommandError(f"no completion for {shell}")
    write(kind(context.find_root().command, {}, "durable-llm", "_DURABLE_LLM_COMPLETE").source() + "\n")
