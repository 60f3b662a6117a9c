"""Chat templates: Jinja programs that come with a checkpoint, so run as hostile code, in `jaxinfer.text.sandbox`."""

import datetime
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2

from jaxinfer.errors import CheckpointError, RequestError
from jaxinfer.text.sandbox import Budget, Environment, Instrument, LimitError, budget, check_format

__all__ = ["ChatTemplate"]

MAX_SOURCE = 1 << 17  # characters; the longest template known to us has 30,000


class ChatTemplate:
    """A compiled chat template, with the names and filters that transformers gives it. Safe to share among threads.

    Raises:
        CheckpointError: too long, or not valid Jinja.
    """

    def __init__(self, source: str):
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"a chat template has at most {MAX_SOURCE} characters, this one has {len(source)}")
        environment = Environment(raise_exception=_raise_exception, strftime_now=_strftime_now)
        token = budget.set(Budget())  # constant expressions are evaluated while compiling
        try:
            tree = Instrument().visit(environment.parse(source))
            code = environment.compile(tree.set_environment(environment))
            self._template = jinja2.Template.from_code(environment, code, environment.globals)
        except Exception as error:  # Jinja's, the Python compiler's, or that of a filter on constants
            _fail("can't be compiled", error)
        finally:
            budget.reset(token)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text.

        Raises:
            RequestError: the template refuses these messages (`raise_exception`).
            CheckpointError: it fails, or takes more time or memory than the sandbox allows.
        """
        token = budget.set(Budget(variables))
        try:
            return self._template.render(variables)
        except _Refusal as error:
            raise RequestError(f"the checkpoint's chat template refuses these messages: {error}") from None
        except Exception as error:  # a template can raise whatever Python can
            _fail("fails on these messages", error)
        finally:
            budget.reset(token)


class _Refusal(jinja2.TemplateError):
    """Raised by a template itself."""


def _fail(what: str, error: Exception) -> NoReturn:
    reason = f"it {error}" if isinstance(error, LimitError) else f"{type(error).__name__}: {error}"
    raise CheckpointError(f"the checkpoint's chat template {what}: {reason:.500}") from None


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(format: str) -> str:
    check_format(format)
    return datetime.datetime.now().strftime(format)
