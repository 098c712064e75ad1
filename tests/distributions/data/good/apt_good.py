"""A plugin as it should be: it observes, offers a provider, and brings a command."""

from __future__ import annotations

from apt_core import PluginInfo, ProviderSpec, hookimpl

PLUGIN = PluginInfo(summary="counts steps and offers a norm", version="1.2.0")

steps = 0


@hookimpl
def apt_register_providers():
    return [
        ProviderSpec(
            kind="norm",
            name="good_norm",
            factory="apt_core.modeling.layers.norm:RMSNormProvider",
            version="1.2.0",
            summary="RMSNorm under another name",
        )
    ]


@hookimpl
def on_step_end(step):
    global steps
    steps += 1


@hookimpl
def apt_metrics():
    return {"steps": steps}


def greet(arguments):
    print("greetings to", *arguments)
