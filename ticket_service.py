#!/usr/bin/env python3
"""A `/ticket` slash command for Mattermost, in one file that needs nothing but Python.

The life of a ticket:

1. Somebody types `/ticket`, and Mattermost calls `POST /ticket`. We make sure that the bot can post
   in the channel, and open a dialog whose signed `state` says who asked, where and when.
2. The person fills in the dialog, and Mattermost calls `POST /ticket/submit`. We check the state
   and the answers. Whatever is wrong, the dialog stays open and says so: no text is ever lost.
3. The ticket is posted in the channel, once, however often the dialog is submitted.
4. When the answer has gone out, the person gets an ephemeral confirmation with the ticket's ID, and
   the bot replies in the thread, which makes the reporter follow it.

Its button, which closes and reopens it, calls `POST /ticket/action`.

To change the form, edit FORM or name a file in FORM_FILE. What people read is below FORM, how a
ticket looks is in ticket_message(). `--help` lists the settings; the rest is in README.md.
"""

import argparse
import base64
import collections
import contextlib
import email.utils
import functools
import http.client
import http.server
import hmac
import io
import json
import logging
import math
import os
import queue
import re
import resource
import secrets
import select
import selectors
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

log = logging.getLogger("ticket")


# ------------------------------------------------- 1. The form, and the sentences people read

# Mattermost's own dialog object, as it goes over the wire:
# https://developers.mattermost.com/integrate/plugins/interactive-dialogs/
# One entry is the field in the dialog, the rule its answer is checked by, and the line in the
# ticket. An option may carry "mention": "@team-or-user", which goes into a ticket that chose it.
FORM = {
    "title": "New ticket",
    "submit_label": "Create ticket",
    "elements": [
        {
            "display_name": "Cluster", "name": "cluster", "type": "select",
            "options": [
                {"text": "Production", "value": "prod"},
                {"text": "Development / Test", "value": "dev"},
                {"text": "DMZ", "value": "dmz"},
            ],
        },
        {
            "display_name": "VM / resource", "name": "resource", "type": "text",
            "placeholder": "vm-042",
        },
        {
            "display_name": "Problem description", "name": "problem", "type": "textarea",
            "placeholder": "What happens, since when, and what did you expect?",
        },
        {
            "display_name": "Network information", "name": "network", "type": "textarea",
            "optional": True, "help_text": "IP addresses, ports",
        },
    ],
}

# What a ticket can be: its last line, the button that makes it so, the reply in the thread, and
# what somebody reads who pressed too late. The hashtags find all tickets that are open, or closed.
STATUS_LABEL = "**Status:**"
STATUSES = {
    "open": {
        "line": f"{STATUS_LABEL} #ticket-open",
        "button": "Reopen",
        "reply": "@{user_name} reopened this ticket.",
        "already": "This ticket is already reopened by @{user_name}.",
    },
    "closed": {
        "line": f"{STATUS_LABEL} #ticket-closed by @{{user_name}}",
        "button": "Close",
        "reply": "@{user_name} closed this ticket.",
        "already": "This ticket is already closed by @{user_name}.",
    },
}

YES, NO = "yes", "no"
REPLY = "Please reply in this thread: questions, news and the solution belong here."
CHANGED = "@{user_name} submitted the form again, with other answers:"
CONFIRMATION = "Your ticket has been created: [{ticket_id}]({link})"

# Instead of the form, after `/ticket`. INVITE and ARCHIVED also stand in a form that was submitted.
THIS_CHANNEL, THE_TICKET_CHANNEL = "this channel", "the ticket channel"
TYPE_AGAIN, SUBMIT_AGAIN = "type `/ticket` again", "submit again"
INVITE = ("I can't post in {place} yet. Invite me there with `/invite @{bot}`, then {again}. "
          "(If I am not in the team, a team admin has to add me first.)")
ARCHIVED = "I can't post in {place}: it is archived. Please use another channel."
NO_CHANNEL = "I can't post in {place}: it does not exist. Please tell your Mattermost admin."
USE_A_CHANNEL = "I can't post in direct and group messages. Please type `/ticket` in a channel."
BAD_TOKEN = "Mattermost does not accept my bot token. Please tell your Mattermost admin."
FORM_LATE = "The form came too late for Mattermost. Please type `/ticket` again."
FORM_NOT_OPENED = "Mattermost did not open the form. Please type `/ticket` again in a moment."
FORM_TOO_SMALL = "The form holds only the beginning of what you typed."
WHAT_YOU_TYPED = "What you typed:"

# In the form, above its buttons.
FORM_INVALID = "This form is no longer valid. Copy your text, type /ticket and paste it."
NOT_REACHED = "Mattermost does not answer. Submit again in a moment: that makes one ticket only."
NOT_ACCEPTED = "Mattermost did not accept the ticket. Submit again in a moment, or tell your admin."
DAY_FULL = "All ticket IDs of today are used up. Please submit again after midnight UTC."
TICKET_TOO_LONG = "The ticket is {excess} characters too long. Please shorten it and submit again."
TOO_LONG_THERE = "The ticket is too long for this Mattermost. Please shorten it and submit again."
OUR_FAULT = "Something went wrong in the ticket service. Please try again, or tell your admin."

# After a button was pressed.
NOT_OUR_BUTTON = ("This button does not belong to a ticket of mine, so nothing was changed. "
                  "Please tell your Mattermost admin.")
NOT_CHANGED = "I can't read this ticket now; it stays as it is. Try again, or invite me here."

# In the form, under a field.
REQUIRED = "Please fill in this field."
NOT_TICKED = "Please tick this box."
NOT_AN_OPTION = "Please choose one of the options."
NOT_TEXT = "Please write plain text here."
NOT_A_NUMBER = "Please write a number, such as 42."
NOT_AN_EMAIL = "Please write an e-mail address, such as alice@example.com."
NOT_A_URL = "Please write an address that begins with http:// or https://."
TOO_SHORT = "Please write at least {limit} characters."
TOO_LONG = "Please write at most {limit} characters: {excess} are too many."


# ------------------------------------------------------------------------------- 2. Settings

VARIABLES = {
    "MATTERMOST_URL": "where this service reaches Mattermost: https://mattermost.example.com",
    "BOT_TOKEN": "access token of the bot account",
    "SLASH_TOKEN": "token of the slash command; several (one per team) with commas in between",
    "CALLBACK_URL": "where Mattermost reaches this service: http://tickets.example.com:8080",
    "PORT": "port to listen on; default 8080",
    "TICKET_CHANNEL": "ID of one channel for all tickets; default: where /ticket is typed",
    "FORM_FILE": "JSON file with a form of your own; default: the built-in form",
    "SSL_CERT_FILE": "CA certificates to trust; default: those of the system",
}
FROM_FILE = ("MATTERMOST_URL", "BOT_TOKEN", "SLASH_TOKEN", "CALLBACK_URL", "TICKET_CHANNEL")

ID = re.compile("[A-Za-z0-9]{1,64}")  # of anything in Mattermost: what may become part of a URL
PRINTABLE = re.compile("[!-~]+")

# Mattermost only logs what breaks these limits, but refuses a whole dialog for a wrong JSON type.
LABEL_BYTES, NAME_BYTES, HELP_BYTES = 24, 300, 150
DEFAULT_BYTES = {"text": 150, "textarea": 3000, "select": 3000, "radio": 3000, "bool": 150}
MAX_LENGTH = {"text": 150, "textarea": 3000}  # characters, where an element does not say
SUBTYPES = ("", "text", "email", "number", "tel", "url")
JSON_TYPES = (
    (str, "a text", ("display_name", "name", "subtype", "default", "placeholder", "help_text",
                     "data_source")),
    (bool, "true or false", ("optional", "multiselect")),
    (int, "a whole number", ("min_length", "max_length")),
    (list, "a list", ("options",)),
)


class SettingsError(Exception):
    """All that is wrong with the settings, a line each."""


def option_problems(element):
    """Yield what is wrong with the options of a select or radio element."""
    values = [""]
    for option in element.get("options", []):
        if not isinstance(option, dict) or not all(
                isinstance(option.get(key), str) and option[key] for key in ("text", "value")):
            yield "every option needs a text and a value"
            return
        if not re.fullmatch(r"@[\w.-]+", str(option.get("mention", "@nobody"))):
            yield f"the mention of {option['text']!r} must look like @team-or-user"
        values.append(option["value"])
    if len(values) == 1:
        yield "options are missing"
    if len(values) > len(set(values)):
        yield "two options have the same value"
    if element.get("default", "") not in values:
        yield f"default {element['default']!r} is not the value of an option"


def element_problems(element):
    """Yield what is wrong with an element of a form."""
    kind = element.get("type")
    if kind not in tuple(DEFAULT_BYTES):
        yield f"type {kind!r} is not supported, only {', '.join(DEFAULT_BYTES)}"
        return
    wrong = [f"{key} must be {description}" for wanted, description, keys in JSON_TYPES
             for key in keys if key in element and type(element[key]) is not wanted]
    if wrong:
        yield from wrong
        return
    for key, least, most in (
            ("display_name", 1, LABEL_BYTES), ("name", 1, NAME_BYTES), ("help_text", 0, HELP_BYTES),
            ("default", 0, DEFAULT_BYTES[kind]), ("placeholder", 0, DEFAULT_BYTES[kind])):
        size = len(element.get(key, "").encode())
        if not least <= size <= most:
            yield f"{key} must have {least} to {most} bytes, not {size}"
    if element.get("subtype", "") not in SUBTYPES:
        yield f"subtype {element['subtype']!r} is not supported, only {', '.join(SUBTYPES[1:])}"
    if element.get("data_source") or element.get("multiselect"):
        yield "data_source and multiselect are not supported, only options"
    longest = element.get("max_length") or MAX_LENGTH.get(kind, math.inf)
    if not 0 <= element.get("min_length", 0) <= longest:
        yield "min_length must be at least 0, and not more than max_length"
    if kind == "bool" and element.get("default", "") not in ("", "true", "false"):
        yield 'default must be "true" or "false"'
    if kind in ("select", "radio"):
        yield from option_problems(element)


def form_problems(form):
    """Yield what is wrong with a form, so that it is said at start and not found out by people."""
    if not isinstance(form, dict):
        yield "must be a JSON object"
        return
    for key in ("title", "submit_label", "introduction_text"):
        if not isinstance(form.get(key, ""), str):
            yield f"{key} must be a text"
    if not 1 <= len(str(form.get("title", "")).encode()) <= LABEL_BYTES:
        yield f"title must have 1 to {LABEL_BYTES} bytes"
    elements = form.get("elements")
    if not isinstance(elements, list) or not elements:
        yield "elements must be a list with at least one element"
        return
    names = set()
    for number, element in enumerate(elements, 1):
        if not isinstance(element, dict):
            yield f"element {number} must be a JSON object"
            continue
        name = str(element.get("name") or number)
        yield from (f"element {name}: {problem}" for problem in element_problems(element))
        if name in names:
            yield f"element {name}: another one has the same name"
        names.add(name)


def checked_form(path):
    """Return the form in a JSON file."""
    try:
        with open(path, encoding="utf-8") as file:
            form = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"can't be read: {error}") from error
    if problems := list(form_problems(form)):
        raise ValueError("\n".join(problems))
    return form


def checked_url(text):
    """Return an http or https URL, without a slash at its end."""
    url = urllib.parse.urlsplit(text)
    if not PRINTABLE.fullmatch(text) or url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("must be a URL such as https://host or http://host:8080/path")
    if url.port == 0 or any(mark in text for mark in "@?#"):
        raise ValueError("must be a URL without user name, query and fragment")
    return text.rstrip("/")


def checked_token(text):
    """Return a token that can stand in an HTTP header."""
    if not PRINTABLE.fullmatch(text):
        raise ValueError("must be printable ASCII without spaces")
    return text


def checked_tokens(text):
    """Return one or several tokens, as bytes."""
    tokens = [checked_token(token).encode() for token in re.split(r"[\s,]+", text) if token]
    if not tokens:
        raise ValueError("must hold a token")
    return tokens


def checked_channel(text):
    """Return the ID of a channel."""
    if not ID.fullmatch(text) or len(text) != 26:
        raise ValueError("must be a channel's ID (26 letters and digits), not its name")
    return text


def checked_port(text):
    """Return a port number; 0 lets the system choose one."""
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError("must be a number from 0 to 65535")
    return int(text)


def tls_context(ca_file):
    """Return what verifies certificates; ssl itself says nothing when it has nobody to trust."""
    context = ssl.create_default_context()
    directory = ssl.get_default_verify_paths().capath
    if ca_file:
        context.load_verify_locations(ca_file)
    elif not context.cert_store_stats()["x509"] and not (directory and os.listdir(directory)):
        raise ValueError("is needed: this system has no CA certificates of its own")
    return context


def setting_text(environ, name):
    """Return a variable, or what is in the file that <name>_FILE names; "" if there is neither."""
    text = environ.get(name, "").strip()
    path = environ.get(f"{name}_FILE", "") if name in FROM_FILE else ""
    if not path:
        return text
    if text:
        raise ValueError(f"is given twice: as {name} and as {name}_FILE")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(100_000).strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"can't be read from {name}_FILE: {error}") from error
    if not text:
        raise ValueError(f"can't be read from {name}_FILE: {path} is empty")
    return text


def is_loopback(url):
    """Return whether a URL leads back to the machine that it is used on."""
    host = urllib.parse.urlsplit(url).hostname
    return host in ("localhost", "::1") or host.startswith("127.")


@dataclass(frozen=True)
class Settings:
    """What the environment tells the service; VARIABLES says what each one means."""

    mattermost_url: str
    bot_token: str = field(repr=False)
    slash_tokens: list = field(repr=False)  # of bytes
    callback_url: str
    port: int
    ticket_channel: str  # "" for the channel where /ticket is typed
    form: dict
    tls: ssl.SSLContext | None  # None where Mattermost is reached over http

    @classmethod
    def from_environment(cls, environ):
        """Return the settings in a mapping; raise SettingsError with all that is wrong in it."""
        problems = [f"FORM {problem}" for problem in form_problems(FORM)]

        def read(name, check, default=None):
            try:
                if text := setting_text(environ, name):
                    return check(text)
                if default is None:
                    raise ValueError(f"is missing: {VARIABLES[name]}")
            except ValueError as error:
                problems.extend(f"{name} {line}" for line in str(error).splitlines())
            return default

        values = {
            "mattermost_url": read("MATTERMOST_URL", checked_url),
            "bot_token": read("BOT_TOKEN", checked_token),
            "slash_tokens": read("SLASH_TOKEN", checked_tokens),
            "callback_url": read("CALLBACK_URL", checked_url),
            "port": read("PORT", checked_port, 8080),
            "ticket_channel": read("TICKET_CHANNEL", checked_channel, ""),
            "form": read("FORM_FILE", checked_form, FORM),
            "tls": None,
        }
        if str(values["mattermost_url"]).startswith("https:"):
            try:
                values["tls"] = tls_context(environ.get("SSL_CERT_FILE"))
            except (OSError, ValueError) as error:
                problems.append(f"SSL_CERT_FILE {error}")
        if problems:
            raise SettingsError("\n".join(problems))
        return cls(**values)


# ------------------------------------------------- 3. Reading: what Mattermost says to us

FORM_FIELDS = 1000  # Mattermost repeats keys for everybody who is mentioned in the text
JSON_DEPTH = 100
JSON_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
USER_NAME = re.compile(r"[\w.:-]{1,64}", re.ASCII)  # a colon in those of shared channels
HOOK = re.compile(r"/([A-Za-z0-9]+)$")
LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029\u2424]")  # what Mattermost's clients break at
UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class Sorry(Exception):
    """Something that a person in Mattermost has to know; str() is the sentence they read."""


class Refused(Exception):
    """An HTTP request that Mattermost would not send; str() is the reason, for whoever sent it."""

    def __init__(self, status, reason, *headers):
        super().__init__(reason)
        self.status, self.headers = status, headers


def clean(text):
    """Return what a person typed, with plain line ends and without what can't be seen or sent."""
    return UNSEEN.sub("", LINE_ENDS.sub("\n", text)).strip()


def json_object(body):
    """Return the JSON object in the body of a request."""
    try:
        # json would also take UTF-16 and UTF-32, in which the brackets can't be counted as here.
        text = body.decode()
        outside = JSON_STRING.sub("", text)  # people paste JSON and stack traces into a ticket
        if outside.count("[") + outside.count("{") > JSON_DEPTH:
            raise Refused(400, "the JSON is nested too deeply")  # json could crash the thread
        value = json.loads(text)
    except ValueError as error:
        raise Refused(400, "the body is not JSON") from error
    if not isinstance(value, dict):
        raise Refused(400, "the body is not a JSON object")
    return value


@dataclass(frozen=True)
class SlashCommand:
    """`/ticket`, as somebody typed it; Mattermost has checked who and where.

    https://developers.mattermost.com/integrate/slash-commands/custom/
    """

    user_id: str
    user_name: str
    channel_id: str
    trigger_id: str
    text: str
    hook: str  # ID of the response URL; its host is never used, since a client can choose it

    @classmethod
    def from_body(cls, body, settings):
        """Read the body, a form; its token must be one of ours."""
        try:
            fields = dict(urllib.parse.parse_qsl(
                body.decode(), keep_blank_values=True, max_num_fields=FORM_FIELDS))
        except ValueError as error:
            raise Refused(400, "the body is not a form") from error
        token = fields.get("token", "").encode()
        if not any([hmac.compare_digest(token, known) for known in settings.slash_tokens]):
            raise Refused(401, "SLASH_TOKEN does not hold the token of this slash command")
        user_id, user_name, channel_id, trigger_id = (
            fields.get(name, "") for name in ("user_id", "user_name", "channel_id", "trigger_id"))
        if not (ID.fullmatch(user_id) and ID.fullmatch(channel_id) and trigger_id
                and USER_NAME.fullmatch(user_name)):
            raise Refused(400, "user_id, user_name, channel_id or trigger_id is missing or odd")
        hook = HOOK.search(fields.get("response_url", ""))
        return cls(user_id, user_name, channel_id, trigger_id, clean(fields.get("text", "")),
                   hook[1] if hook else "")


@dataclass(frozen=True)
class Submission:
    """A dialog, as somebody submitted it. Nothing in it can be trusted before its state is opened.

    https://developers.mattermost.com/integrate/plugins/interactive-dialogs/#dialog-submission
    """

    user_id: str
    state: str
    answers: dict
    cancelled: bool

    @classmethod
    def from_body(cls, body, _):
        """Read the body, a JSON object; what has the wrong type counts as empty."""
        fields = json_object(body)
        ours = fields.get("type") in (None, "", "dialog_submission")  # not a look-up or a refresh

        def read(key, wanted):
            value = fields.get(key)
            return value if ours and isinstance(value, wanted) else wanted()

        return cls(read("user_id", str), read("state", str), read("submission", dict),
                   read("cancelled", bool))


@dataclass(frozen=True)
class Press:
    """A button, as somebody pressed it. Only `signed` proves that it is one of ours.

    https://developers.mattermost.com/integrate/plugins/interactive-messages/
    """

    user_name: str
    post_id: str
    signed: str

    @classmethod
    def from_body(cls, body, _):
        """Read the body, a JSON object; what is missing or odd counts as empty."""
        fields = json_object(body)
        context = fields.get("context")
        signed = context.get("signed") if isinstance(context, dict) else ""

        def read(value, pattern):
            return value if isinstance(value, str) and pattern.fullmatch(value) else ""

        return cls(read(fields.get("user_name"), USER_NAME), read(fields.get("post_id"), ID),
                   read(signed, PRINTABLE))


def text_problem(element, text):
    """Return what is wrong with the text typed into an element, if anything is."""
    least = element.get("min_length", 0)
    most = element.get("max_length") or MAX_LENGTH[element["type"]]
    subtype = element.get("subtype")
    if len(text) < least:
        return TOO_SHORT.format(limit=least)
    if len(text) > most:
        return TOO_LONG.format(limit=most, excess=len(text) - most)
    if subtype == "number" and not NUMBER.fullmatch(text):
        return NOT_A_NUMBER
    if subtype == "email" and "@" not in text:
        return NOT_AN_EMAIL
    if subtype == "url" and not ("http://" in text or "https://" in text):
        return NOT_A_URL
    return None


def read_answer(element, value):
    """Return the answer in a submitted value, and what is wrong with it, if anything is.

    The answer is a text, or True or False where the element is a bool; None if there is none.
    Clients leave out what was not touched, or send null or ""; numbers may arrive as strings.
    """
    if isinstance(value, (list, dict)):
        return None, NOT_TEXT
    if value is None:
        value = ""
    text = clean(value if isinstance(value, str) else json.dumps(value))
    if element["type"] == "bool":
        if text.lower() not in ("", "true", "false"):
            return None, NOT_AN_OPTION
        ticked = text.lower() == "true"
        return ticked, None if ticked or element.get("optional") else NOT_TICKED
    if not text:
        return None, None if element.get("optional") else REQUIRED
    if element["type"] in ("select", "radio"):
        known = any(option["value"] == value for option in element["options"])
        return value, None if known else NOT_AN_OPTION
    return text, text_problem(element, text)


def read_answers(elements, submission):
    """Return the answers to a form, and what is wrong with them; both by the element's name."""
    answers, errors = {}, {}
    for element in elements:
        name = element["name"]
        answer, problem = read_answer(element, submission.get(name))
        if problem:
            errors[name] = problem
        elif answer is not None:
            answers[name] = answer
    return answers, errors


# ------------------------------------------------- 4. Writing: what we say to Mattermost

# Without escapes: they would push a long ticket over Mattermost's limit of 300,000 bytes.
JSON = json.JSONEncoder(ensure_ascii=False)
MESSAGE_LIMIT = 16383  # characters in a post
JOINER = "\u2060"  # invisible; Mattermost sees no mention and no image where it stands
STATUS_LINE = re.compile(rf"^{re.escape(STATUS_LABEL)} #.*$", re.MULTILINE)
CHANNEL_MENTION = re.compile(r"(?<![^\W_])@(?=(all|channel|here)(?![^\W_]))", re.IGNORECASE)


def json_bytes(value):
    """Return JSON in UTF-8."""
    return JSON.encode(value).encode("utf-8", "replace")


def longest_run(mark, text):
    """Return how often a character stands in a row at the most."""
    return max(map(len, re.findall(f"{mark}+", text)), default=0)


def fenced(text):
    """Return Markdown that shows a text as it is."""
    fence = "`" * max(3, longest_run("`", text) + 1)
    return f"{fence}\n{text}\n{fence}"


def inline_code(text):
    """Return Markdown that shows one line as it is."""
    ticks = "`" * (longest_run("`", text) + 1)
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{room}{text}{room}{ticks}"


def block_quote(text):
    """Return Markdown that quotes a text; without the empty line the quote would go on."""
    return "".join(f"> {line}\n" for line in text.split("\n")) + "\n"


def harmless(text):
    """Return a text that pings nobody but persons, and makes nobody's client load an image."""
    return CHANNEL_MENTION.sub(f"@{JOINER}", text).replace("![", f"!{JOINER}[")


def ephemeral(text):
    """Return an answer that only the person who typed the command sees."""
    # Without skip_slack_parsing, a typed <!channel> would become a mention.
    return {"response_type": "ephemeral", "text": text, "skip_slack_parsing": True}


def given_back(sentence, text):
    """Return an ephemeral answer that gives people their text back."""
    return ephemeral(f"{sentence}\n{WHAT_YOU_TYPED}\n{fenced(text)}" if text else sentence)


def not_opened(sentence, command):
    """Return the answer to a command that could not open its dialog."""
    return given_back(sentence, command.text if command else "")


def not_filed(sentence, _):
    """Return the answer to a submission that made no ticket: the dialog stays open and says so."""
    return {"error": sentence}


def not_changed(sentence, _):
    """Return the answer to a press that changed nothing, which only who pressed sees."""
    return {"ephemeral_text": sentence}


def prefilled(elements, text):
    """Return the elements with a text in the first textarea, and whether all of it found room."""
    if not text:
        return elements, True
    for index, element in enumerate(elements):
        if element["type"] == "textarea":
            room = element.get("max_length") or MAX_LENGTH["textarea"]
            default = text[:room].encode()[:DEFAULT_BYTES["textarea"]].decode(errors="ignore")
            filled = {**element, "default": default}
            return [*elements[:index], filled, *elements[index + 1:]], default == text
    return elements, False


def without_mentions(elements):
    """Return the elements as Mattermost knows them."""
    return [
        {**element, "options": [{"text": option["text"], "value": option["value"]}
                                for option in element["options"]]}
        if "options" in element else element
        for element in elements
    ]


def answer_line(element, answer):
    """Return the line, or lines, of a ticket for one answer."""
    label = f"**{element['display_name']}:**"
    if element["type"] == "textarea":
        return f"{label}\n{block_quote(harmless(answer))}"
    if element["type"] == "bool":
        return f"{label} `{YES if answer else NO}`\n"
    if element["type"] == "text":
        return f"{label} {inline_code(harmless(answer.replace(chr(10), ' ')))}\n"
    option = next(option for option in element["options"] if option["value"] == answer)
    mention = f" {option['mention']}" if "mention" in option else ""
    return f"{label} {inline_code(option['text'])}{mention}\n"


def answer_lines(elements, answers):
    """Return the part of a ticket that shows the answers, in the order of the form."""
    return "".join(answer_line(element, answers[element["name"]])
                   for element in elements if element["name"] in answers)


def ticket_message(ticket_id, user_name, elements, answers):
    """Return the message of a ticket; the hashtag makes its ID searchable."""
    lines = answer_lines(elements, answers)
    return f"#### #{ticket_id} · @{user_name}\n{lines}{STATUSES['open']['line']}"


def with_status(message, status, user_name):
    """Return a ticket's message with another last status line; what else was edited stays."""
    line = STATUSES[status]["line"].format(user_name=user_name)
    lines = list(STATUS_LINE.finditer(message))
    if not lines:
        return f"{message}\n\n{line}"
    start, end = lines[-1].span()
    return message[:start] + line + message[end:]


def button(status, url, signed):
    """Return the attachments of a post with a button; Mattermost shows its context to nobody."""
    integration = {"url": url, "context": {"signed": signed}}
    return [{"actions": [{"id": status, "name": STATUSES[status]["button"], "type": "button",
                          "integration": integration}]}]


def new_post(channel_id, message, pending_post_id, root_id="", **props):
    """Return a post that may be sent twice: Mattermost knows its pending_post_id for 30 seconds."""
    return {
        "channel_id": channel_id,
        "root_id": root_id,
        "message": message,
        "pending_post_id": pending_post_id,
        # In a post with attachments, even none, Mattermost loads no preview and no image of a link.
        "props": {"attachments": [], **props},
    }


def milliseconds():
    """Return the time as Mattermost writes it."""
    return int(time.time() * 1000)


def ticket_props(ticket_id, asked, nonce, answers):
    """Return the props of a ticket, for scripts and for ourselves."""
    now = milliseconds()
    ticket = {"user_id": asked.user_id, "user_name": asked.user_name, "answers": answers,
              "created_at": now, "nonce": nonce,
              "status": "open", "status_by": asked.user_name, "status_at": now}
    return {"is_ticket": True, "ticket_id": ticket_id, "ticket": ticket}


# ------------------------------------------------------------------------------- 5. Trust

STATE_AGE = 24 * 60 * 60  # seconds
DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's: none looks like another
TICKET_ID = re.compile(rf"Ticket-[0-9]{{8}}-[{DIGITS}]{{4}}")
IDS_PER_DAY = len(DIGITS) ** 4
DAY = 24 * 60 * 60  # seconds


class Seal:
    """Signs what passes through other hands and must come back unchanged.

    The key is derived from the bot's token: it survives a restart and needs no setting.
    """

    def __init__(self, bot_token):
        self.key = hmac.digest(bot_token.encode(), b"mattermost-ticket", "sha256")

    def close(self, purpose, *fields):
        """Return a text that holds the fields and can only be opened for the same purpose."""
        payload = base64.urlsafe_b64encode(json_bytes(fields))
        return b".".join((payload, self.signature(purpose, payload))).decode()

    def open(self, purpose, text):
        """Return the fields in a text, or None if we did not close it for this purpose."""
        payload, _, signature = text.encode("utf-8", "replace").partition(b".")
        if not hmac.compare_digest(signature, self.signature(purpose, payload)):
            return None
        return json.loads(base64.urlsafe_b64decode(payload))

    def signature(self, purpose, payload):
        """Return the signature of a payload, as text."""
        signed = hmac.digest(self.key, purpose.encode() + b"." + payload, "sha256")
        return base64.urlsafe_b64encode(signed)


class State(NamedTuple):
    """Who asked for a ticket, where and when: what a dialog's state says."""

    user_id: str
    user_name: str
    channel_id: str  # where /ticket was typed
    time: int  # when, in seconds
    nonce: str  # one for each dialog


def opened_state(seal, submission):
    """Return the state of a submission, if it is ours, of the same user, and not too old."""
    fields = seal.open("state", submission.state)
    state = State(*fields) if fields else None
    if not state or state.user_id != submission.user_id or time.time() - state.time > STATE_AGE:
        raise Sorry(FORM_INVALID)
    return state


class TicketIds:
    """Ticket-YYYYMMDD-XXXX: the day (UTC) and its 1,048,576 IDs, spread evenly over the hours.

    So IDs sort by time and need no storage. Each is later than the clock's and the last one's.
    """

    def __init__(self, clock=time.time):
        self.clock, self.lock = clock, threading.Lock()
        self.day, self.last = "", -1

    def next(self):
        """Return an ID that was not used before."""
        with self.lock:
            now = self.clock()
            day = time.strftime("%Y%m%d", time.gmtime(now))
            if day > self.day:
                self.day, self.last = day, -1
            number = max(self.last + 1, int(IDS_PER_DAY * (now % DAY) / DAY))
            if number >= IDS_PER_DAY:
                raise Sorry(DAY_FULL)
            self.last = number
            digits = "".join(DIGITS[number >> shift & 31] for shift in (15, 10, 5, 0))
            return f"Ticket-{self.day}-{digits}"

    def ahead(self):
        """Return for how many seconds the clock will not have passed the last ID."""
        now = self.clock()
        if time.strftime("%Y%m%d", time.gmtime(now)) != self.day:
            return 0
        return max(0, DAY * (self.last + 1) / IDS_PER_DAY - now % DAY)


# ------------------------------------------------------------ 6. Mattermost's REST API

ANSWER_LIMIT = 2**20  # bytes of an answer that are read
ERROR_ID = re.compile(r"[a-z0-9_.]{1,100}")
POST_PENDING = "api.post.deduplicate_create_post.pending"
CANNOT_BE_JOINED = "api.channel.add_user_to_channel.type.app_error"  # direct and group messages
CHANNEL_ARCHIVED = "api.post.create_post.can_not_post_to_deleted.error"
MESSAGE_TOO_LONG = ("model.post.is_valid.message_length.app_error",
                    "model.post.is_valid.msg.app_error")  # the second up to Mattermost 9
TRIGGER_EXPIRED = "interactive_message.decode_trigger_id.expired"


class MattermostError(Exception):
    """A call that Mattermost did not answer with success. str() is for the log.

    `status` is None if there was no answer that makes sense; `id` is Mattermost's name for the
    error. Its own words are not kept: they may hold a response hook.
    """

    def __init__(self, reason, status=None, error_id="", retry_after=None):
        super().__init__(reason)
        self.status, self.id, self.retry_after = status, error_id, retry_after
        self.may_pass = status in (None, 429, 502, 503, 504) or error_id == POST_PENDING
        self.may_have_worked = status is None or status >= 500


class NotAllowed(MattermostError):
    """A call about something that is not there for the bot: 400, 403 or 404."""


def mattermost_error(answer):
    """Return the error in an answer of Mattermost's, or of a proxy in front of it."""
    try:
        error_id = json.loads(answer.body)["id"]
    except (ValueError, LookupError, TypeError, RecursionError):
        error_id = ""
    if not ERROR_ID.fullmatch(str(error_id)):  # plugins put their own words there
        error_id = ""
    reason = f"Mattermost answered {answer.status} {error_id}".rstrip()
    if 300 <= answer.status < 400:
        reason += ", a redirect: is MATTERMOST_URL right?"
    wait = answer.headers.get("Retry-After", "")
    seconds = float(wait) if re.fullmatch("[0-9]+", wait) else None  # of any size; not a date
    kind = NotAllowed if answer.status in (400, 403, 404) else MattermostError
    return kind(reason, answer.status, error_id, seconds)


def with_id(answer):
    """Return what Mattermost answered, if it has an ID."""
    if not ID.fullmatch(str(answer.get("id") or "")):
        raise MattermostError("the answer is not what Mattermost answers")
    return answer


class Deadline(threading.local):
    """The time by which all that is done for a request must be over; a thread has one at a time."""

    ends = math.inf  # by time.monotonic()

    def left(self, most):
        """Return how many seconds are left, at most so many; raise TimeoutError if none are."""
        left = min(most, self.ends - time.monotonic())
        if left <= 0:
            raise TimeoutError("no time is left")
        return left


deadline = Deadline()


class TimedReader(io.RawIOBase):
    """Reads from a socket until the deadline: a socket's own time-out begins anew with each byte."""

    def __init__(self, raw, connection):
        super().__init__()
        self.raw, self.connection, self.most = raw, connection, connection.gettimeout()

    def readable(self):
        """Return True, for io.BufferedReader."""
        return True

    def readinto(self, buffer):
        """Read what is there, or wait for it."""
        self.connection.settimeout(deadline.left(self.most))
        return self.raw.readinto(buffer)

    def close(self):
        """Close the socket, if nobody else uses it."""
        self.raw.close()
        super().close()


class TimedResponse(http.client.HTTPResponse):
    """An HTTPResponse that is read until the deadline."""

    def __init__(self, sock, *args, **details):
        super().__init__(sock, *args, **details)
        self.fp = io.BufferedReader(TimedReader(self.fp.detach(), sock))


class Answer(NamedTuple):
    """An answer of Mattermost's, read to its end."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @classmethod
    def whole(cls, response):
        """Read a response; raise if it is cut short, or too long."""
        with response:
            body = response.read(ANSWER_LIMIT + 1)
        if len(body) > ANSWER_LIMIT:
            raise ValueError("the answer is too long")
        if response.length:  # bytes that are still owed: read() with a size does not tell
            raise http.client.IncompleteRead(body, response.length)
        return cls(response.status, response.headers, body)


class KeptConnections(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens http and https URLs on connections that are kept for the next call.

    A new TLS connection costs more time than all else in a call. Safe because each of our calls
    may be repeated: a GET, a dialog, a hook, or a post with a pending_post_id.
    """

    most, longest = 64, 10  # idle connections, and seconds for which they are

    def __init__(self, context, proxied):
        super().__init__(context=context)
        self.proxied = proxied
        self.idle = collections.deque()

    def do_open(self, connection_class, request, **details):
        """Return the answer, read to its end; urllib's own do_open() leaves that to the caller."""
        def new_connection(host, **more):
            connection = connection_class(host, **more)
            connection.response_class = TimedResponse
            return connection

        if self.proxied:
            return Answer.whole(super().do_open(new_connection, request, **details))
        if kept := self.take():
            try:
                return self.exchange(kept, request)
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException) as error:
                log.debug("a kept connection had died: %r", error)
        return self.exchange(new_connection(request.host, timeout=request.timeout, **details),
                             request)

    def exchange(self, connection, request):
        """Send a request, return its answer, and keep the connection if the other side does."""
        try:
            if connection.sock:
                connection.sock.settimeout(request.timeout)
            connection.request(request.get_method(), request.selector, request.data,
                               dict(request.header_items()))
            answer = Answer.whole(connection.getresponse())
        except BaseException:
            connection.close()
            raise
        if connection.sock:  # http.client has dropped it if the answer said Connection: close
            self.keep(connection)
        return answer

    def keep(self, connection):
        """Keep an idle connection for the next call."""
        self.idle.append((connection, time.monotonic()))
        if len(self.idle) > self.most:
            with contextlib.suppress(IndexError):  # another thread was faster
                self.idle.popleft()[0].close()

    def take(self):
        """Return the connection that was used last and is still good, or None."""
        with contextlib.suppress(IndexError):  # none is left
            while True:
                connection, since = self.idle.pop()
                poll = select.poll()
                poll.register(connection.sock, select.POLLIN)
                # What can be read before we asked can only be the end.
                if time.monotonic() - since < self.longest and not poll.poll(0):
                    return connection
                connection.close()
        return None

    def close(self):
        """Close what is kept."""
        with contextlib.suppress(IndexError):
            while True:
                self.idle.pop()[0].close()


class Mattermost:
    """The part of the API that we use, as the bot. Every method may raise MattermostError.

    https://developers.mattermost.com/api-documentation/
    """

    timeout = 5  # seconds, for each step of a call: connect, send, wait, read

    def __init__(self, settings):
        self.url = settings.mattermost_url
        self.headers = {"Authorization": f"Bearer {settings.bot_token}",
                        "Content-Type": "application/json"}
        url = urllib.parse.urlsplit(self.url)
        proxied = (url.scheme in urllib.request.getproxies()
                   and not urllib.request.proxy_bypass(url.netloc))
        # With context=None, urllib would load all CA certificates even for http.
        self.connections = KeptConnections(
            settings.tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), proxied)
        # Bare: urllib's usual opener follows redirects, to any host and with our token.
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(self.connections)
        if proxied:
            self.opener.add_handler(urllib.request.ProxyHandler())

    def send(self, method, path, payload=None):
        """Return the body of an answer that means success."""
        data = None if payload is None else json_bytes(payload)
        request = urllib.request.Request(self.url + path, data, self.headers, method=method)
        try:
            answer = self.opener.open(request, timeout=deadline.left(self.timeout))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise MattermostError(f"no answer from Mattermost: {error!r:.300}") from error
        if answer.status not in (200, 201):
            raise mattermost_error(answer)
        return answer.body

    def call(self, method, path, payload=None, wanted=dict):
        """Return the JSON in an answer that means success: an object, or whatever is wanted."""
        body = self.send(method, "/api/v4" + path, payload)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise MattermostError("the answer is not JSON: is MATTERMOST_URL right?") from error
        if not isinstance(answer, wanted):
            raise MattermostError("the answer is not what Mattermost answers")
        return answer

    def get_client_config(self):
        """Return the public configuration: `Version`, `SiteURL`, …, all of them texts."""
        return self.call("GET", "/config/client?format=old")

    def get_me(self):
        """Return the bot's user: `id`, `username`, `roles`, `is_bot`, …"""
        return with_id(self.call("GET", "/users/me"))

    def get_my_teams(self):
        """Return the bot's teams: `name`, …"""
        return self.call("GET", "/users/me/teams", wanted=list)

    def get_channel(self, channel_id):
        """Return a channel: `type` (O, P, D, G), `delete_at`, …; of a member or a public one."""
        return self.call("GET", f"/channels/{channel_id}")

    def get_channel_member(self, channel_id):
        """Return the bot's membership; 403 or 404 if there is none."""
        return self.call("GET", f"/channels/{channel_id}/members/me")

    def add_channel_member(self, channel_id, user_id):
        """Let the bot join: 201 for public channels of its teams."""
        return self.call("POST", f"/channels/{channel_id}/members", {"user_id": user_id})

    def get_channel_posts(self, channel_id):
        """Return the latest posts of a channel."""
        posts = self.call("GET", f"/channels/{channel_id}/posts?per_page=200").get("posts")
        return list(posts.values()) if isinstance(posts, dict) else []

    def create_post(self, post):
        """Return a post as it has been made: `id`, `props`, …"""
        return with_id(self.call("POST", "/posts", post))

    def get_post(self, post_id):
        """Return a post: `user_id`, `message`, `props`, …; without what its buttons carry."""
        return with_id(self.call("GET", f"/posts/{post_id}"))

    def create_ephemeral_post(self, user_id, channel_id, message):
        """Show a message to one person; only privileged bots may."""
        post = {"channel_id": channel_id, "message": message}
        return self.call("POST", "/posts/ephemeral", {"user_id": user_id, "post": post})

    def open_dialog(self, trigger_id, url, dialog):
        """Open a dialog for the person whose command the trigger belongs to."""
        opening = {"trigger_id": trigger_id, "url": url, "dialog": dialog}
        return self.call("POST", "/actions/dialogs/open", opening)

    def answer_command(self, hook, answer):
        """Answer a slash command later: five times, for half an hour."""
        self.send("POST", f"/hooks/commands/{hook}", answer)


# ------------------------------------------------------------------------------- 7. The flow

REMEMBERED = 10_000  # dialogs, and channels


def fingerprint(answers):
    """Return a number that is the same for the same answers."""
    return hash(json.dumps(answers, sort_keys=True))


def is_ticket(post, nonce):
    """Return whether what Mattermost calls a post is the ticket with a nonce."""
    try:
        props = post["props"]
        return bool(props["ticket"]["nonce"] == nonce and ID.fullmatch(post["id"])
                    and TICKET_ID.fullmatch(props["ticket_id"]))
    except (LookupError, TypeError):
        return False


@contextlib.contextmanager
def lock_in_time(lock):
    """Hold a lock; be Sorry if somebody else holds it for as long as there is time."""
    if not lock.acquire(timeout=deadline.left(STATE_AGE)):
        raise Sorry(NOT_REACHED)
    try:
        yield
    finally:
        lock.release()


class Recent(dict):
    """A dictionary that forgets what came first when it gets too long."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def remember(self, key, value):
        """Add a value, unless the key has one; return the key's value."""
        with self.lock:
            value = self.setdefault(key, value)
            if len(self) > REMEMBERED:
                del self[next(iter(self))]
            return value

    def forget(self, key):
        """Drop a key, if it is there."""
        with self.lock:
            self.pop(key, None)


@dataclass(slots=True)
class Dialog:
    """A dialog, and the one ticket that comes of it, however often it is submitted."""

    asked: State
    hook: str = ""
    unanswered: float = math.inf  # when Mattermost was first sent the ticket and did not answer
    lock: threading.Lock = field(default_factory=threading.Lock)
    ticket_id: str = ""
    post_id: str = ""  # once there is a ticket
    posted: int = 0  # fingerprint of the answers in the ticket, or those posted after
    has_reply: bool = False
    confirmed: bool = False  # or about to be


@dataclass(slots=True)
class LastPress:
    """What the last press of a ticket's button made of it; its post may not yet say so."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    change: dict = field(default_factory=lambda: {"status_at": 0})


class Desk:
    """What happens to a ticket, in order: from the command to the dialog, and from there on."""

    patience = 20  # seconds, for all tries of a post
    pause = 0.5  # seconds before the second try
    known_there = 25  # seconds; Mattermost knows a pending_post_id for 30
    press_takes = 30  # seconds, until Mattermost has changed a post or never will
    wait_at_stop = 10  # seconds

    def __init__(self, settings):
        self.settings = settings
        self.elements = settings.form["elements"]
        self.form = {**settings.form, "callback_id": "ticket",
                     "elements": without_mentions(self.elements)}
        self.mattermost = Mattermost(settings)
        self.seal = Seal(settings.bot_token)
        self.ids = TicketIds()
        self.dialogs = Recent()
        self.presses = Recent()
        self.good_channels = Recent()
        self.place = THE_TICKET_CHANNEL if settings.ticket_channel else THIS_CHANNEL
        self.site_url = ""

    # From the command to the dialog

    def on_slash_command(self, command):
        """Open the form; yield the answer to the command."""
        self.check_channel(self.target(command.channel_id), TYPE_AGAIN)
        asked = State(command.user_id, command.user_name, command.channel_id, int(time.time()),
                      secrets.token_urlsafe(24))
        self.dialogs.remember(asked.nonce, Dialog(asked, command.hook))
        elements, complete = prefilled(self.form["elements"], command.text)
        dialog = {**self.form, "elements": elements, "state": self.seal.close("state", *asked)}
        try:
            self.mattermost.open_dialog(
                command.trigger_id, self.settings.callback_url + "/ticket/submit", dialog)
        except MattermostError as error:
            late = error.id == TRIGGER_EXPIRED
            raise Sorry(FORM_LATE if late else FORM_NOT_OPENED) from error
        yield {} if complete else given_back(FORM_TOO_SMALL, command.text)

    def target(self, channel_id):
        """Return the channel that gets the ticket of somebody who typed /ticket in a channel."""
        return self.settings.ticket_channel or channel_id

    def check_channel(self, channel_id, again):
        """Return if the bot can post in a channel, having joined it where it may; else be Sorry.

        A channel that Mattermost says nothing about is good until it refuses a post.
        """
        if channel_id in self.good_channels:
            return
        try:
            self.enter_channel(channel_id, again)
        except MattermostError as error:
            if error.status == 401:
                raise Sorry(BAD_TOKEN) from error
            log.warning("channel=%s could not be looked at: %s", channel_id, error)
        else:
            self.good_channels.remember(channel_id, True)

    def enter_channel(self, channel_id, again):
        """Make the bot a member of a channel, or find that it can post without; else be Sorry."""
        channel = {}
        try:
            channel = self.mattermost.get_channel(channel_id)
        except NotAllowed as error:
            if error.status == 404:
                raise Sorry(NO_CHANNEL.format(place=self.place)) from error
        if channel.get("delete_at"):  # an archived channel can be joined all the same
            raise Sorry(ARCHIVED.format(place=self.place))
        if channel.get("type") == "D":  # with the bot: nobody else would see the ticket
            raise Sorry(USE_A_CHANNEL)
        with contextlib.suppress(NotAllowed):
            self.mattermost.get_channel_member(channel_id)
            return
        me = self.mattermost.get_me()
        try:
            self.mattermost.add_channel_member(channel_id, me["id"])
        except NotAllowed as error:
            if error.id == CANNOT_BE_JOINED:
                raise Sorry(USE_A_CHANNEL) from error
            roles = str(me.get("roles")).split()
            everywhere = "system_post_all" in roles
            here = "system_post_all_public" in roles and channel.get("type") == "O"
            if not everywhere and not here:
                raise Sorry(INVITE.format(
                    place=self.place, bot=me.get("username"), again=again)) from error

    # From the submission to the ticket

    def on_submission(self, submission):
        """File a ticket; yield the answer to the dialog, then confirm it and begin its thread."""
        if submission.cancelled:
            yield {}
            return
        asked = opened_state(self.seal, submission)
        answers, errors = read_answers(self.elements, submission.answers)
        if errors:
            yield {"errors": errors}
            return
        # One that is not remembered, as it was opened before the last start, may have a ticket.
        dialog = self.dialogs.remember(asked.nonce, Dialog(asked, unanswered=-math.inf))
        with lock_in_time(dialog.lock):
            try:
                if not dialog.post_id:
                    self.file_ticket(dialog, answers)
                if dialog.posted != fingerprint(answers):
                    self.post_changes(dialog, answers)
            except MattermostError as error:
                raise Sorry(self.why_not_filed(error, dialog)) from error
            first, dialog.confirmed = not dialog.confirmed, True
        yield {}
        if first:
            self.confirm(dialog)
            self.begin_thread(dialog)

    def file_ticket(self, dialog, answers):
        """Post a ticket, or find the one that an earlier attempt made."""
        asked, channel_id = dialog.asked, self.target(dialog.asked.channel_id)
        dialog.ticket_id = dialog.ticket_id or self.ids.next()
        message = ticket_message(dialog.ticket_id, asked.user_name, self.elements, answers)
        excess = len(with_status(message, "closed", "x" * 64)) - MESSAGE_LIMIT  # room to close it
        if excess > 0:
            raise Sorry(TICKET_TOO_LONG.format(excess=excess))
        # Not the nonce itself: people can read it in the state, and make a post with it first.
        nonce = self.seal.signature("ticket", asked.nonce.encode()).decode()
        props = ticket_props(dialog.ticket_id, asked, nonce, answers)
        props["attachments"] = self.button(dialog.ticket_id, "closed")
        began = time.monotonic()
        try:
            made = None
            if began - dialog.unanswered > self.known_there:
                made = self.earlier_ticket(channel_id, nonce)
            made = made or self.create_ticket(new_post(channel_id, message, nonce, **props))
        except MattermostError as error:
            if error.may_have_worked:
                dialog.unanswered = min(dialog.unanswered, began)
            raise
        dialog.ticket_id, dialog.post_id = made["props"]["ticket_id"], made["id"]
        dialog.posted = fingerprint(made["props"]["ticket"].get("answers"))
        log.info("ticket=%s user=%s channel=%s post=%s",
                 dialog.ticket_id, asked.user_name, channel_id, dialog.post_id)
        dialog.has_reply = bool(made.get("reply_count"))

    def earlier_ticket(self, channel_id, nonce):
        """Return the post that an earlier submission of the same dialog made, or None."""
        posts = []
        with contextlib.suppress(NotAllowed):  # a bot that may post everywhere may not read
            posts = self.mattermost.get_channel_posts(channel_id)
        made = [post for post in posts if is_ticket(post, nonce)]
        if made and made[0].get("user_id") == self.mattermost.get_me()["id"]:
            return made[0]
        return None

    def create_ticket(self, post):
        """Create the post of a ticket; where the bot is no longer a member, join first."""
        try:
            made = self.create_post(post)
        except MattermostError as error:
            if error.status != 403:
                raise
            self.good_channels.forget(post["channel_id"])
            self.check_channel(post["channel_id"], SUBMIT_AGAIN)
            made = self.create_post(post)
        if not is_ticket(made, post["pending_post_id"]):
            raise MattermostError("the answer is not the ticket that was posted")
        return made

    def create_post(self, post):
        """Create a post, again and again while Mattermost is away; all tries make one post."""
        pause, ends = self.pause, time.monotonic() + self.patience
        while True:
            try:
                return self.mattermost.create_post(post)
            except MattermostError as error:
                wait = error.retry_after or pause
                left = min(ends, deadline.ends) - time.monotonic()
                if not error.may_pass or wait + self.mattermost.timeout > left:
                    raise
            time.sleep(wait)
            pause = min(2 * pause, 2)

    def post_changes(self, dialog, answers):
        """Post answers that are not in the ticket in its thread.

        That is so if an earlier attempt made the ticket, its answer was lost, and the form was
        changed before it was submitted again.
        """
        asked = dialog.asked
        lines = answer_lines(self.elements, answers)
        message = f"{CHANGED.format(user_name=asked.user_name)}\n{lines}".rstrip()
        self.reply(self.target(asked.channel_id), dialog.post_id, message)
        dialog.posted = fingerprint(answers)

    def reply(self, channel_id, root_id, message):
        """Post in the thread of a ticket."""
        post = new_post(channel_id, message, secrets.token_urlsafe(24), root_id)
        self.create_post(post)

    def why_not_filed(self, error, dialog):
        """Return the sentence for somebody whose ticket Mattermost did not take."""
        if error.id == CHANNEL_ARCHIVED:
            self.good_channels.forget(self.target(dialog.asked.channel_id))
            return ARCHIVED.format(place=self.place)
        if error.id in MESSAGE_TOO_LONG or error.status == 413:
            return TOO_LONG_THERE
        if error.status == 401:
            return BAD_TOKEN
        return NOT_REACHED if error.may_pass else NOT_ACCEPTED

    # After the answer: the ticket exists, and what fails now can only be logged

    def begin_thread(self, dialog):
        """Reply to a ticket: from then on, its reporter follows the thread."""
        if dialog.has_reply:
            return
        try:
            self.reply(self.target(dialog.asked.channel_id), dialog.post_id, REPLY)
        except MattermostError as error:
            log.warning("ticket=%s has no reply: %s", dialog.ticket_id, error)

    def confirm(self, dialog):
        """Tell the reporter, and nobody else, that there is a ticket."""
        asked = dialog.asked
        link = f"{self.get_site_url()}/_redirect/pl/{dialog.post_id}"
        text = CONFIRMATION.format(ticket_id=dialog.ticket_id, link=link)
        try:
            if dialog.hook:
                return self.mattermost.answer_command(dialog.hook, ephemeral(text))
        except MattermostError as error:
            log.warning("ticket=%s response hook: %s", dialog.ticket_id, error)
        try:
            self.mattermost.create_ephemeral_post(asked.user_id, asked.channel_id, text)
        except MattermostError as error:
            log.warning("ticket=%s was not confirmed to user=%s: %s",
                        dialog.ticket_id, asked.user_name, error)

    def get_site_url(self):
        """Return the address that people use Mattermost at."""
        if not self.site_url:
            try:
                self.site_url = str(self.mattermost.get_client_config().get("SiteURL")).rstrip("/")
            except MattermostError as error:
                log.warning("the site URL is not known: %s", error)
        return self.site_url if self.site_url.startswith("http") else self.settings.mattermost_url

    # From the button to another status

    def on_press(self, press):
        """Close or reopen a ticket; yield the answer to the button, then tell the thread.

        Mattermost changes the post when it has our answer. Who presses in between reads the old
        post: so the last press is remembered for as long as that can take.
        """
        ticket_id, wanted = self.seal.open("action", press.signed) or ("", "")
        if not (ticket_id and press.user_name and press.post_id):
            raise Sorry(NOT_OUR_BUTTON)
        last = self.presses.remember(ticket_id, LastPress())
        with lock_in_time(last.lock):
            post = self.ticket_post(press.post_id, ticket_id)
            ticket, now = post["props"]["ticket"], milliseconds()
            if last.change["status_at"] > now - self.press_takes * 1000:
                ticket = {**ticket, **last.change}
            if ticket.get("status") == wanted:
                raise Sorry(STATUSES[wanted]["already"].format(user_name=ticket["status_by"]))
            last.change = {"status": wanted, "status_by": press.user_name, "status_at": now}
        log.info("ticket=%s status=%s user=%s", ticket_id, wanted, press.user_name)
        other = "open" if wanted == "closed" else "closed"
        props = {**post["props"], "ticket": {**ticket, **last.change},
                 "attachments": self.button(ticket_id, other)}
        message = with_status(post["message"], wanted, press.user_name)
        yield {"update": {"message": message, "props": props}}
        self.tell_thread(post, wanted, press.user_name)

    def button(self, ticket_id, status):
        """Return the attachments of a ticket with the button that gives it a status."""
        signed = self.seal.close("action", ticket_id, status)
        return button(status, self.settings.callback_url + "/ticket/action", signed)

    def ticket_post(self, post_id, ticket_id):
        """Return the post of a ticket as it is now, if the bot has written it."""
        try:
            post, me = self.mattermost.get_post(post_id), self.mattermost.get_me()
        except MattermostError as error:
            raise Sorry(NOT_CHANGED) from error
        props = post.get("props")
        if not (isinstance(props, dict) and isinstance(props.get("ticket"), dict)
                and props.get("ticket_id") == ticket_id and post.get("user_id") == me["id"]
                and isinstance(post.get("message"), str)):
            raise Sorry(NOT_OUR_BUTTON)
        return post

    def tell_thread(self, post, status, user_name):
        """Tell everybody who follows a ticket what has become of it."""
        try:
            self.reply(post.get("channel_id"), post.get("id"),
                       STATUSES[status]["reply"].format(user_name=user_name))
        except MattermostError as error:
            log.warning("the thread was not told that user=%s made a ticket %s: %s",
                        user_name, status, error)

    # What an admin should know

    def checks(self):
        """Yield a logging level and a sentence for all that can be checked from here."""
        callback_url = self.settings.callback_url
        if is_loopback(callback_url) and not is_loopback(self.settings.mattermost_url):
            yield logging.WARNING, f"CALLBACK_URL: {callback_url} is Mattermost's own machine"
        try:
            config = self.mattermost.get_client_config()
        except MattermostError as error:
            yield logging.ERROR, f"MATTERMOST_URL: {error}"
            return
        version = str(config.get("Version"))
        yield logging.INFO, f"MATTERMOST_URL: Mattermost {version} answers"
        if [int(part) for part in re.findall(r"\d{1,4}", version)[:2]] < [9, 4]:
            yield logging.WARNING, "Mattermost before 9.4 gives a form 3 seconds to open: update it"
        self.site_url = str(config.get("SiteURL")).rstrip("/")
        if not self.site_url.startswith("http"):
            yield logging.WARNING, "Mattermost has no SiteURL: set it, for the links to tickets"
        yield from self.bot_checks()

    def bot_checks(self):
        """Yield a logging level and a sentence for what the bot is and where it can post."""
        try:
            me = self.mattermost.get_me()
        except MattermostError as error:
            wrong = error.status == 401
            yield logging.ERROR, f"BOT_TOKEN: {'it is not valid: ' if wrong else ''}{error}"
            return
        name = me.get("username")
        if me.get("is_bot"):
            yield logging.INFO, f"BOT_TOKEN: it is that of the bot @{name}"
        else:
            yield logging.WARNING, f"BOT_TOKEN: @{name} is a person: create a bot account"
        try:
            if not self.mattermost.get_my_teams():
                yield logging.ERROR, f"@{name} is in no team: let a team admin add it"
            if self.settings.ticket_channel:
                self.enter_channel(self.settings.ticket_channel, TYPE_AGAIN)
                yield logging.INFO, f"TICKET_CHANNEL: @{name} can post there"
        except (Sorry, MattermostError) as problem:
            yield logging.ERROR, f"@{name} may not be able to post: {problem}"

    def close(self):
        """Let the clock pass the last ticket ID, so that the next start can't give it again."""
        ahead = self.ids.ahead()
        if ahead > self.wait_at_stop:
            log.warning("start again in %d s at the earliest: until then, ticket IDs could repeat",
                        ahead)
        time.sleep(min(ahead, self.wait_at_stop))
        self.mattermost.connections.close()


# ------------------------------------------------------------------------- 8. The HTTP edge

HEAD_LIMIT = 16 * 1024  # bytes of request line and headers
BODY_LIMIT = 256 * 1024  # bytes; 16,383 characters are up to 196 KB in a form
FILES = 16 * 1024  # that may be open, if the system lets us
UNFINISHED_LIMIT = 64 * 2**20  # bytes of all requests that are still arriving
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
HEAD = re.compile(
    rb"(?:\r\n)?(%b) (/[!-~]*) (HTTP/1\.[01])\r\n((?:%b:[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n"
    % (TOKEN, TOKEN))
BARE_LF = re.compile(rb"(?<!\r)\n")
HOST = re.compile(rb"[\w.~:\[\]-]+")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
ONLY_ONCE = (b"host", b"content-length", b"content-type", b"authorization", b"expect")


class Route(NamedTuple):
    """What is done with the body of a request: it is read, reacted to, and answered."""

    read: Callable  # (body, settings) -> what Mattermost says; may raise Refused
    react: Callable  # (desk, what Mattermost says) yields the answer, then does what is left
    sorry: Callable  # (sentence, what Mattermost says) -> the answer if something is wrong


HEALTH = "/health"
ROUTES = {
    "/ticket": Route(SlashCommand.from_body, Desk.on_slash_command, not_opened),
    "/ticket/submit": Route(Submission.from_body, Desk.on_submission, not_filed),
    "/ticket/action": Route(Press.from_body, Desk.on_press, not_changed),
}


class Head(NamedTuple):
    """Request line and headers of a request."""

    method: str
    path: str  # without the query
    version: str
    headers: dict  # names in lower case; all is bytes
    size: int  # bytes


def read_head(received):
    """Return the head that begins these bytes, or None if more of it is to come; or refuse it.

    Strictly: what can be read in two ways is refused, since a proxy in front of us may have read it
    the other way. http.server's own parser is lenient, and most of its cost.
    """
    end = received.find(b"\r\n\r\n", 2)  # RFC 9112, 2.2: one empty line may come first
    head = bytes(received[:HEAD_LIMIT + 1 if end < 0 else end + 4])
    if BARE_LF.search(head):
        raise Refused(400, "a line of the head ends without a carriage return")
    if len(head) > HEAD_LIMIT:
        raise Refused(431, "the head of the request is too long")
    if end < 0:
        return None
    match = HEAD.fullmatch(head)
    if not match:
        raise Refused(400, "the head of the request is malformed")
    method, target, version, lines = match.groups()
    headers = {}
    for line in lines.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name in ONLY_ONCE and name in headers:
            raise Refused(400, f"{name.decode()} is there twice")
        headers[name] = value.strip(b" \t")
    path = target.partition(b"?")[0].decode()
    return Head(method.decode(), path, version.decode(), headers, len(head))


def body_length(head):
    """Return how long the body of a request is; refuse a request that its head shows to be no good.

    Too much is refused before it is read, and so is what nobody would answer.
    """
    headers = head.headers
    if b"transfer-encoding" in headers:
        raise Refused(501, "Transfer-Encoding is not supported")
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise Refused(417, "Expect is not supported, but for 100-continue")
    host = headers.get(b"host", b"" if head.version == "HTTP/1.1" else b"none")
    if not HOST.fullmatch(host):
        raise Refused(400, "Host is missing or malformed")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit():
        raise Refused(400, "Content-Length is malformed")
    if len(length) > 9 or int(length) > BODY_LIMIT:
        raise Refused(413, f"the body is longer than {BODY_LIMIT} bytes")
    if head.method not in METHODS:
        raise Refused(501, "the method is not known")
    if head.path not in ROUTES and head.path != HEALTH:
        raise Refused(404, "there is nothing at this path")
    allowed = ("GET", "HEAD") if head.path == HEALTH else ("POST",)
    if head.method not in allowed:
        raise Refused(405, f"the method must be {' or '.join(allowed)}",
                      f"Allow: {', '.join(allowed)}")
    if head.method == "POST" and b"content-length" not in headers:
        raise Refused(411, "Content-Length is missing")
    return int(length)


@functools.lru_cache(maxsize=1)
def http_date(seconds):
    """Return a time as HTTP writes it."""
    return email.utils.formatdate(seconds, usegmt=True)


@dataclass(slots=True, eq=False)
class Connection:
    """A connection, and what has arrived of its only request."""

    socket: socket.socket
    address: str
    accepted: float  # when, by time.monotonic()
    due: float  # when it must be over
    received: bytearray = field(default_factory=bytearray)
    head: Head | None = None
    length: int = 0  # bytes of the body
    watched: bool = False  # by Server.selector
    refused: Refused | None = None  # what is still sent is dropped

    def is_whole(self):
        """Return whether the request is all here; refuse it as soon as that is clear."""
        if not self.head:
            self.head = read_head(self.received)
            if self.head:
                self.length = body_length(self.head)
        return self.head and len(self.received) >= self.head.size + self.length

    def body(self):
        """Return the body of a request that is whole."""
        return bytes(self.received[self.head.size:self.head.size + self.length])


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives one answer to one request that is all here, or that is refused, and closes.

    So no request can hide behind another, no thread waits for a client, and Mattermost loses no
    POST on a connection that is just being closed.
    """

    timeout = 10  # seconds for the answer, if the client does not read it
    note = ""

    def setup(self):
        """Take the request from memory, where the server has put it."""
        head = self.request.head
        self.command, self.path = (head.method, head.path) if head else ("", "")

    def handle(self):
        """Answer the request; what is to be done after the answer is done when it has gone out."""
        if self.request.refused:
            self.refuse(self.request.refused)
        elif self.path == HEALTH:
            self.answer(200, {"status": "ok"})
        else:
            self.answer_person(ROUTES[self.path])

    def finish(self):
        """Do nothing: each answer has been sent at once."""

    def answer_person(self, route):
        """Answer a person, whatever happens: with 200, and before Mattermost gives up.

        For anything else, Mattermost would throw the form away, and what was typed with it.
        """
        deadline.ends = self.request.due
        said, reaction = None, ()
        try:
            said = route.read(self.request.body(), self.server.desk.settings)
            reaction = route.react(self.server.desk, said)
            answer = next(reaction)
        except Refused as refused:
            self.refuse(refused)
            return
        except Sorry as problem:
            self.note = f"{problem} {problem.__cause__ or ''}".rstrip()
            answer = route.sorry(str(problem), said)
        except Exception:  # a bug of ours must not cost anybody their text
            log.exception("POST %s failed", self.path)
            answer = route.sorry(OUR_FAULT, said)
        self.answer(200, answer)
        self.server.shutdown_request(self.request)
        deadline.ends = time.monotonic() + self.server.follow_up_within
        for _ in reaction:
            pass

    def refuse(self, refused):
        """Answer a request that Mattermost would not send."""
        self.note = str(refused)
        self.answer(refused.status, {"error": str(refused)}, *refused.headers)

    def answer(self, status, payload, *headers):
        """Send an answer in one write: Mattermost 9.4 to 9.7 loses a body that comes later."""
        body = json_bytes(payload)
        head = "\r\n".join((
            f"HTTP/1.1 {status} {self.responses[status][0]}",
            f"Date: {http_date(int(time.time()))}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
            *headers, "", ""))
        with contextlib.suppress(OSError):  # a client that is gone: what was asked for is done
            self.request.socket.settimeout(self.timeout)
            self.request.socket.sendall(head.encode() + (b"" if self.command == "HEAD" else body))
        self.log_request(status)

    def log_request(self, code="-", size="-"):
        """Log a line for each answer, but for good health checks; never a query or a body."""
        if code == 200 and self.path == HEALTH:
            return
        level = logging.WARNING if self.note or code != 200 else logging.INFO
        what = f"{self.command} {self.path[:200]!r}" if self.command else "no HTTP"
        log.log(level, "%s %s %s %s", self.client_address, what, code, self.note)


class Threads:
    """Threads that are used again: a ThreadPoolExecutor without its futures, which cost too much.

    Only one thread, the server's loop, may call run() and join().
    """

    def __init__(self, most):
        self.most, self.threads = most, []
        self.jobs, self.idle = queue.SimpleQueue(), threading.Semaphore(0)

    def run(self, work, *details):
        """Let an idle thread do some work, or a new one, or the next that is done."""
        self.jobs.put((work, details))
        if self.idle.acquire(blocking=False) or len(self.threads) >= self.most:
            return
        thread = threading.Thread(target=self.work_on)
        with contextlib.suppress(RuntimeError):  # the system's limit is lower than ours
            thread.start()
            self.threads.append(thread)

    def work_on(self):
        """Do one job after the other, until there is a None."""
        while job := self.jobs.get():
            work, details = job
            work(*details)
            self.idle.release()

    def join(self):
        """Wait until all work is done."""
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()


def raised_file_limit():
    """Raise the soft limit of open files, which is often 1,024; return what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return FILES if soft == resource.RLIM_INFINITY else soft


class Server(http.server.ThreadingHTTPServer):
    """ThreadingHTTPServer, with a thread only for a request that is all here.

    One loop, serve_forever(), owns every connection until its request is whole. It takes what has
    arrived, judges the head as soon as it is there, and answers health checks and refusals itself:
    a short answer to a new connection can't block. A whole request goes to a thread, which waits for
    nobody but Mattermost. The others are in one table, `connections`, which is bounded in number,
    time and memory; nothing that a client does can end the loop.
    """

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    request_queue_size = 1024
    arrive_within = 10  # seconds in which a request has to arrive
    grace = 0.1  # seconds in which a connection does not give way: the honest speak by then
    linger = 2  # seconds for which a refused client may go on sending
    answer_within = 24  # seconds in which a person gets an answer; Mattermost gives up after 30
    follow_up_within = 20  # seconds for what is done after the answer

    def __init__(self, desk, port):
        files = raised_file_limit()
        self.most_connections = min(4096, files // 3)
        # A thread may open a connection to Mattermost as well.
        self.threads = Threads(min(512, files // 4))
        self.desk = desk
        self.connections = {}  # whose requests are not whole: keys, the oldest first
        self.unfinished = 0  # bytes that they have sent
        self.next_look = 0.0
        self.selector = selectors.DefaultSelector()
        self.stopping, self.stopped = threading.Event(), threading.Event()
        super().__init__(("", port), Handler)

    def server_bind(self):
        """Bind to IPv4 and IPv6, without HTTPServer's look-up of a name: that can take 10 s."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    def server_activate(self):
        """Listen, and never wait in accept()."""
        super().server_activate()
        self.socket.setblocking(False)

    def serve_forever(self, poll_interval=0.1):
        """Serve until shutdown(): the stock loop looks at the listening socket only."""
        self.selector.register(self.socket, selectors.EVENT_READ)
        while not self.stopping.is_set():
            self.serve(poll_interval)
        self.selector.unregister(self.socket)
        for _ in range(self.request_queue_size):  # whom the kernel has taken already
            if not self.accept():
                break
        self.socket.close()
        ends = time.monotonic() + 1  # for requests that are on their way
        for connection in self.connections:
            connection.due = min(connection.due, ends)
        while self.connections:
            self.serve(0.02)
        self.threads.join()
        self.selector.close()
        self.stopped.set()

    def shutdown(self):
        """Stop accepting; return when all that was accepted is done, follow-ups included."""
        self.stopping.set()
        self.stopped.wait()

    def serve(self, seconds):
        """Deal with all that arrives within some seconds, and cut off who is late."""
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self.socket:
                self.accept()
            else:
                self.receive(key.data)
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + 0.05
        for connection in [one for one in self.connections if one.due < now]:
            self.hang_up(connection)

    def accept(self):
        """Accept a connection and take what it has sent already; return whether there was one.

        Where the table is full, its oldest gives way, once it has had its time.
        """
        now = time.monotonic()
        if len(self.connections) >= self.most_connections:
            oldest = next(iter(self.connections))
            if now - oldest.accepted < self.grace:
                time.sleep(0.01)  # seconds; who waits to be accepted is kept by the kernel
                return False
            self.hang_up(oldest)
        try:
            request, (address, *_) = self.get_request()
        except BlockingIOError:
            return False
        except OSError:  # no file is left: do not ask again at once
            time.sleep(0.05)
            return False
        connection = Connection(
            request, address.removeprefix("::ffff:"), now, now + self.arrive_within)
        self.connections[connection] = True
        self.receive(connection)
        return True

    def receive(self, connection):
        """Take what has arrived of a request; whatever is wrong with it, only it can fail."""
        try:
            data = connection.socket.recv(65536, socket.MSG_DONTWAIT)
            if data:
                self.judge(connection, data)
            else:
                self.hang_up(connection)
        except BlockingIOError:
            self.let_wait(connection)
        except OSError:
            self.hang_up(connection)
        except Exception:
            self.handle_error(connection, connection.address)
            self.hang_up(connection)

    def judge(self, connection, data):
        """Let a connection wait, answer it, or let a thread do so, as its request is so far."""
        if connection.refused:
            return
        connection.received += data
        self.unfinished += len(data)
        try:
            if not connection.is_whole():
                self.let_wait(connection)
                return
        except Refused as refused:
            connection.refused = refused
        self.forget(connection)
        if connection.refused or connection.head.path == HEALTH:
            self.process_request_thread(connection, connection.address)
        else:
            self.process_request(connection, connection.address)

    def let_wait(self, connection):
        """Wait for more of a request; if all of them take too much memory, the oldest gives way."""
        if not connection.watched:
            self.selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.watched = True
        head = connection.head
        if head and head.headers.pop(b"expect", None) and head.version == "HTTP/1.1":
            connection.socket.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)
        if self.unfinished > UNFINISHED_LIMIT:
            self.hang_up(next(one for one in self.connections if one.received))

    def forget(self, connection):
        """Wait no longer for more of a request."""
        if self.connections.pop(connection, None):
            self.unfinished -= len(connection.received)
        if connection.watched:
            self.selector.unregister(connection.socket)
            connection.watched = False

    def hang_up(self, connection):
        """End a connection without an answer."""
        self.forget(connection)
        self.close_request(connection.socket)

    def process_request(self, request, client_address):
        """Let a thread answer a request: one that is idle, or a new one while there are few."""
        request.due = time.monotonic() + self.answer_within
        self.threads.run(self.process_request_thread, request, client_address)

    def shutdown_request(self, request):
        """Close a connection; a refused client may still be sending: let it see the answer first.

        To close with unread data would reset the connection, and the answer with it.
        """
        if not request.refused:
            super().shutdown_request(request.socket)
            return
        with contextlib.suppress(OSError):
            request.socket.shutdown(socket.SHUT_WR)
        request.received.clear()
        request.due = time.monotonic() + self.linger
        self.connections[request] = True
        self.let_wait(request)

    def handle_error(self, request, client_address):
        """Log a bug of ours: what clients do is no error."""
        log.exception("a request of %s failed", client_address)


# --------------------------------------------------------------------- 9. The command line

def serve(settings):
    """Run the service until SIGTERM or SIGINT; return the exit status."""
    # Blocked before any thread starts, so that sigwait() gets them; nothing else ends a PID 1.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    desk = Desk(settings)
    try:
        server = Server(desk, settings.port)
    except OSError as error:
        log.error("port %d can't be opened: %s", settings.port, error)
        return 1
    threading.Thread(target=server.serve_forever, args=(0.1,)).start()
    log.info("listening on port %d", server.server_port)
    threading.Thread(target=log_checks, args=(desk,), daemon=True).start()
    signal.sigwait(signals)
    log.info("stopping")
    server.shutdown()
    desk.close()
    return 0


def log_checks(desk):
    """Log what the admin should know; a Mattermost that is down is no reason to stop."""
    for level, sentence in desk.checks():
        log.log(level, "%s", sentence)


def check(settings):
    """Print what is fine and what is not; return the exit status."""
    names = {logging.INFO: "ok", logging.WARNING: "warning", logging.ERROR: "problem"}
    levels = set()
    for level, sentence in Desk(settings).checks():
        levels.add(level)
        print(f"{names[level]:8}{sentence}", flush=True)
    return 1 if logging.ERROR in levels else 0


def health(environ):
    """Ask the service that runs on this machine whether it is well; return the exit status."""
    try:
        port = checked_port(environ.get("PORT", "").strip() or "8080")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        fine = answer.status == 200 and answer.read(100) == json_bytes({"status": "ok"})
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(f"no answer on port {environ.get('PORT') or 8080}: {error}", file=sys.stderr)
        return 1
    return 0 if fine else 1


def main():
    """Do what the command line says; return the exit status."""
    variables = "\n".join(f"  {name:16}{meaning}" for name, meaning in VARIABLES.items())
    parser = argparse.ArgumentParser(
        description="A /ticket slash command for Mattermost. Without an option: run the service.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"environment variables:\n{variables}\n\n"
               f"A file can hold {', '.join(FROM_FILE)}:\nname it in BOT_TOKEN_FILE and so on.")
    options = parser.add_mutually_exclusive_group()
    options.add_argument("--check", action="store_true", help="check settings and Mattermost")
    options.add_argument("--health", action="store_true", help="ask the running service")
    chosen = parser.parse_args()
    if chosen.health:
        return health(os.environ)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        settings = Settings.from_environment(os.environ)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return check(settings) if chosen.check else serve(settings)


if __name__ == "__main__":
    sys.exit(main())
