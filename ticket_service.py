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
5. Buttons in the post take, close and reopen the ticket: Mattermost calls `POST /ticket/action`.

To change the form, edit FORM or name a file in FORM_FILE. What a ticket can be is in STATUSES, what
people read is below it, how a ticket looks is in ticket_message(). `--help` lists the settings;
the rest is in README.md.
"""

import sys

if sys.version_info < (3, 11):  # whatever stands below would fail with a traceback
    print(f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)

import argparse
import base64
import calendar
import collections
import contextlib
import datetime
import functools
import hashlib
import hmac
import http.client
import http.server
import ipaddress
import itertools
import json
import logging
import os
import re
import resource
import secrets
import select
import selectors
import signal
import socket
import socketserver
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

log = logging.getLogger("ticket")


# ------------------------------------------------------- 1. The form, and the sentences people read

# Mattermost's own dialog object, as it goes over the wire:
# https://developers.mattermost.com/integrate/plugins/interactive-dialogs/
# One entry is the field in the dialog, the rule its answer is checked by, and the line in the
# ticket. Keys of ours, which Mattermost does not get:
# - "mention": "@team-or-user" in an option is written into the tickets for which it was chosen;
# - "mention" in the form itself is written into every ticket;
# - "code": True in a textarea shows what is typed there in a code block.
FORM = {
    "title": "New ticket",
    "submit_label": "Create ticket",
    "elements": [
        {
            "display_name": "Cluster", "name": "cluster", "type": "select",
            "placeholder": "Choose a cluster",
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
            "help_text": "Put logs between two lines of three backticks (```).",
            "max_length": 10_000,  # Mattermost's clients cut what is pasted, at 3,000 by default
        },
        {
            "display_name": "Network information", "name": "network", "type": "textarea",
            "optional": True, "help_text": "IP addresses, ports", "code": True,
        },
    ],
}


class Status(NamedTuple):
    """What a ticket can be, and how a ticket says so.

    A further status is a further row of STATUSES. Tickets that exist hold the key, the tag, and the
    line up to the tag: change one of these, and they have no status any more.
    """

    tag: str  # what people search for
    line: str  # of the ticket; holds the tag
    leads_to: tuple  # keys of STATUSES, each by a button. Its own one: somebody else takes over
    color: str  # of the bar beside the buttons
    button: str  # label of the one that leads here
    reply: str  # in the thread, when it has led here; a mention makes somebody follow it
    already: str  # for somebody whose button came too late


STATUSES = {  # the first is that of a new ticket
    "open": Status(
        tag="#ticket-open",
        line="**Status:** #ticket-open",
        leads_to=("taken", "closed"),
        color="#1C58D9",
        button="Reopen",
        reply="{user_name} reopened this ticket.",
        already="This ticket is already reopened by @{user_name}."),
    "taken": Status(
        tag="#ticket-taken",
        line="**Status:** #ticket-taken by @{user_name}",
        leads_to=("taken", "closed"),
        color="#FFBC1F",
        button="Take",
        reply="@{user_name} takes care of this ticket.",
        already="This ticket is already taken by @{user_name}."),
    "closed": Status(
        tag="#ticket-closed",
        line="**Status:** #ticket-closed by @{user_name}",
        leads_to=("open",),
        color="#AEB4C0",
        button="Close",
        reply="{user_name} closed this ticket.",
        already="This ticket is already closed by @{user_name}."),
}
NEW = next(iter(STATUSES))

# In a ticket, its thread, and its confirmation.
YES, NO = "yes", "no"
FOR = "**For:** {mention}"
THREAD = "**Thread:** [where it was asked]({link})"
REPLY = "Please reply in this thread: questions, news, screenshots and the solution belong here."
CHANGED = "{user_name} submitted the form again, with other answers:"
CONFIRMATION = "Your ticket has been created: [{ticket_id}]({link})"
YOU_ARE_OUTSIDE = ("You are not in the ticket's channel, so you will not be told of replies: join "
                   "it, or ask to be let in.")
THEY_ARE_OUTSIDE = ("Not in the ticket's channel, so they will not be told of it: {people}. They "
                    "have to join it, or ask to be let in.")

# Where the bot can't post. Who is told, and where:
# - "command": a person, after /ticket, instead of the form;
# - "submission": a person, above the form's buttons;
# - "ticket channel": a person, in either place, if all tickets go to one channel;
# - "admin": --check, and the log.
# Mattermost shows our answers under the person's own name: so no "I".
CANT_POST = {
    "not a member": {
        "command": "@{bot} can't post in this channel yet: type `/invite @{bot}`, then `/ticket` "
                   "again.",
        "submission": "@{bot} can't post in the channel any more: type `/invite @{bot}` there, "
                      "then submit again.",
        "ticket channel": "@{bot} can't post in the ticket channel. Please tell your admin.",
        "admin": "@{bot} is not a member: type `/invite @{bot}` in that channel (if it is not in "
                 "the team, somebody in it has to add it first: team name ▾ › Invite people)",
    },
    "archived": {
        "command": "This channel is archived. Please type `/ticket` in another one.",
        "submission": "The channel is archived. Copy your text, and use `/ticket` in another one.",
        "ticket channel": "The ticket channel is archived. Please tell your Mattermost admin.",
        "admin": "the channel is archived: unarchive it, or set another one",
    },
    "not in the team": {
        "command": "@{bot} is not in this team yet. Somebody in it has to add it first (team "
                   "name ▾ › Invite people): then type `/ticket` again.",
        "submission": "@{bot} is not in the team any more. Somebody in it has to add it (team "
                      "name ▾ › Invite people): then submit again.",
        "ticket channel": "@{bot} can't post in the ticket channel. Please tell your admin.",
        "admin": "@{bot} is not in the team: somebody in it has to add it (team name ▾ › Invite "
                 "people)",
    },
    "unknown": {
        "command": "Mattermost does not find this channel. Please tell your Mattermost admin.",
        "submission": "Mattermost does not find the channel. Please tell your Mattermost admin.",
        "ticket channel": "The ticket channel does not exist. Please tell your Mattermost admin.",
        "admin": "there is no such channel: its ID is in the channel's menu, under View Info",
    },
    "direct": {
        "command": "@{bot} files no tickets in direct and group messages. Please type `/ticket` "
                   "in a channel.",
        "submission": "@{bot} files no tickets in direct and group messages. Copy your text, and "
                      "use `/ticket` in a channel.",
        "ticket channel": "The ticket channel is a direct message. Please tell your admin.",
        "admin": "it is a direct or group message: set the ID of a channel",
    },
    "read only": {
        "command": "@{bot} may not post in this channel: its admin has to let members, or @{bot}, "
                   "post.",
        "submission": "@{bot} may not post in the channel: its admin has to let members, or "
                      "@{bot}, post. Then submit again.",
        "ticket channel": "@{bot} may not post in the ticket channel. Please tell your admin.",
        "admin": "@{bot} is a member, but may not post: let members, or @{bot}, create posts",
    },
}

# After `/ticket`, instead of the form; FORM_TOO_SMALL beside one that has opened.
FORM_LATE = "The form came too late for Mattermost. Please type `/ticket` again."
FORM_NOT_OPENED = "Mattermost did not open the form. Please type `/ticket` again in a moment."
FORM_REFUSED = "Mattermost refused to open the form. Please tell your Mattermost admin."
FORM_TOO_SMALL = "The form has no room for all that you typed."
WHAT_YOU_TYPED = "What you typed:"

# Instead of the form, above its buttons, or after a button was pressed.
BAD_TOKEN = "Mattermost does not accept the bot's token. Please tell your Mattermost admin."
IN_BETWEEN = ("Something between the ticket service and Mattermost refused it ({status}). "
              "Please tell your admin.")
IN_PLACE = ("Something between the ticket service and Mattermost answered in its place. Please "
            "tell your admin.")
NOT_SECURE = "The ticket service can't reach Mattermost securely. Please tell your admin."
OUR_FAULT = "Something went wrong in the ticket service. Please try again, or tell your admin."

# In the form, above its buttons.
FORM_INVALID = "This form is no longer valid. Copy your text, type /ticket and paste it."
NOT_REACHED = "Mattermost does not answer. Submit again in a moment: that makes one ticket only."
NOT_ACCEPTED = "Mattermost did not accept the ticket. Please tell your admin, or change it."
NOT_KNOWN = "Your ticket may be there: look for it. If it is not, copy your text to a new /ticket."
NOT_ADDED = "{ticket_id} is there, but your changes are not. Please put them into its thread."
REJECTED = "Mattermost did not accept the ticket: {reason}"
DAY_FULL = "All ticket IDs of today are used up. Please submit again after midnight UTC."
TICKET_TOO_LONG = "The ticket is {excess} characters too long. Please shorten it and submit again."
TOO_LONG_THERE = "The ticket is too long for this Mattermost. Please shorten it and submit again."

# After a button was pressed.
NOT_OUR_BUTTON = ("This button does not belong to a ticket of this service; nothing was changed. "
                  "Please tell your Mattermost admin.")
PRESS_AGAIN = "Mattermost does not answer; nothing was changed. Press again in a moment."
NOT_READ = ("Mattermost could not read the ticket; nothing was changed. Please tell your "
            "Mattermost admin.")
NOT_READABLE = ("The ticket's bot can't read this channel any more; nothing was changed. Invite "
                "it again (first to the team, if it is not in it), then press again.")

# In the form, under a field.
REQUIRED = "Please fill in this field."
NOT_TICKED = "Please tick this box."
NOT_AN_OPTION = "Please choose one of the options."
NOT_TEXT = "Please write plain text here."
NOT_A_NUMBER = "Please write a number, such as 42."
NOT_AN_EMAIL = "Please write an e-mail address, such as alice@example.com."
NOT_A_DATE = "Please choose a date, such as 2026-11-27."
NOT_A_TIME = "Please choose a date and a time, such as 2026-11-27T10:00:00Z."
TOO_MANY = "Please choose at most {limit}."
PERSON_NOT_SEEN = "@{bot} can't see this person. Please choose somebody else."
CHANNEL_NOT_SEEN = "@{bot} can't see this channel. Please choose another one."
NOT_A_URL = "Please write an address that begins with http:// or https://."
TOO_SHORT = "Please write at least {limit} characters."
TOO_LONG = "Please write at most {limit} characters: {excess} are too many."


# ------------------------------------------------------------ 2. Writing: what we say to Mattermost

LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029\u2424]")  # what Mattermost's clients break at
# Control characters, what turns the direction of a text, and what nobody sees, but a search does.
UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
                    "\xad\u200b\u2060\u3164\ufeff]")

JOINER = "\u2060"  # invisible; Mattermost sees no mention, image or hashtag where it stands
# The tags of STATUSES, but no longer hashtag that begins like one, such as #ticket-open-2.
TAG_NAMES = "|".join(re.escape(status.tag[1:]) for status in STATUSES.values())
TAG_NAME = f"(?:{TAG_NAMES})(?![-_.]*[a-z0-9])"
STATUS_TAG = re.compile(f"#(?={TAG_NAME})", re.IGNORECASE)

# A letter or digit: with one beside it, as in x@all, Mattermost sees no mention. But [w@all](u) is
# one, since it cuts a link's text at a w, looking for www. And from U+0250 on, there are letters
# that its Unicode may not know. So these do not count as letters: we break an @all beside them.
LETTER = r"[^\W_wW\u0250-\U0010ffff]"
CHANNEL_MENTION = f"(?<!{LETTER})@(?=(?i:all|channel|here)(?!{LETTER}))"
# &#64;all is an @all for Mattermost, and so is @&#97;ll.
REFERENCE = r"&(?=(?i:#x?[0-9a-f]{1,8}|commat);)"
PING = re.compile(f"{CHANNEL_MENTION}|{REFERENCE}")
# ![x](url); !\[x](url) is one as well, where it is in the text of a link.
IMAGE = re.compile(r"!(?=\\*\[)")
# What may be a definition, [x]: url, also behind >, - or - [ ], and over several lines. A match
# ends at the first ] that is neither escaped nor that of a - [ ]. For some programs, it ends at
# such a ] already: so quote() breaks every ]: in a match.
TASK = r"\[[ xX]\](?=\s)"
DEFINITION = re.compile(rf"^(?:[ \t\xa0>*+\-\d.)]|{TASK})*\[(?:{TASK}|[^\]\\]|\\.)*+(?:\]:)?",
                        re.MULTILINE | re.DOTALL)
# A line: blanks (no-break spaces, too, as in the web clients), marks, and what follows.
FENCE = re.compile(r"([ \t\xa0]*)(`{3,}+(?=[^`]*$)|~{3,})(.*)")
LANGUAGE = re.compile(r"[A-Za-z]*[+#]*")  # of the code between fences: as c++


def without_blank_ends(text):
    """Return a text without blank lines at its ends, and blanks at its end."""
    return re.sub(r"\A\s*\n", "", text).rstrip()


def clean(text):
    """Return what a person typed, with plain line ends and without what can't be seen or sent.

    The first of several lines stays indented, as in code.
    """
    text = without_blank_ends(UNSEEN.sub("", LINE_ENDS.sub("\n", text)))
    return text if "\n" in text else text.strip()


def one_line(text):
    """Return a text in one line, as a log or a label can hold it: 300 characters at most."""
    return " ".join(clean(text).split())[:300]


def longest_run(mark, text):
    """Return how often a character stands in a row at the most."""
    return max(map(len, re.findall(f"{mark}+", text)), default=0)


def inline_code(text):
    """Return Markdown that shows a text as it is, in one line."""
    text = text.replace("\n", " ")
    ticks = "`" * (longest_run("`", text) + 1)
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{room}{text}{room}{ticks}"


def code_block(text, language=""):
    """Return Markdown that shows a text as it is."""
    fence = "`" * max(3, longest_run("`", text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def untagged(text):
    """Return a text that puts no ticket into a list of open, taken or closed ones."""
    return STATUS_TAG.sub(f"#{JOINER}", text)


def quotes_and_code(text):
    """Return what was typed, as Markdown that pings no channel and loads no image.

    In code nothing can happen, and people copy from it: it stays as it is. In prose, an invisible
    character breaks what pings or loads. But only fences (``` or ~~~) tell reliably where code is:
    the programs that read Markdown differ on all else. So a text is cut at its fences. Prose
    becomes a quote, which they all end at the empty line behind it, and what was between two fences
    is put between fences of ours, longer than any in it, at the beginning of a line, where they all
    see them.
    (Status tags are broken afterwards, in code too: Mattermost counts hashtags there.)
    """
    markdown, prose, lines = "", "", iter(text.split("\n"))
    for line in lines:
        fence = FENCE.fullmatch(line)
        if not fence:
            prose += line + "\n"
            continue
        # This takes the line that ends the code, too, and drops it.
        code = itertools.takewhile(lambda line: not ends_code(line, fence), lines)
        markdown += quote(prose) + typed_code(fence, list(code))
        prose = ""
    return markdown + quote(prose)


def ends_code(line, fence):
    """Return whether a line ends what a fence begins: with as many marks or more, nothing else,
    and at most 3 blanks more in front, as Markdown has it.
    """
    end = FENCE.fullmatch(line)
    return (end and end[2].startswith(fence[2]) and not end[3].strip()
            and len(end[1].expandtabs()) <= len(fence[1].expandtabs()) + 3)


def typed_code(fence, lines):
    """Return the lines that stood between two fences, in a code block, and an empty line."""
    blanks, language = re.compile(f"[ \t\xa0]{{0,{len(fence[1])}}}"), fence[3].strip()
    lines = [blanks.sub("", line, count=1) for line in lines]
    if not LANGUAGE.fullmatch(language):  # but text: nobody would see it behind our fence
        lines, language = [language, *lines], ""
    return code_block("\n".join(lines), language) + "\n\n"


def quote(prose):
    """Return prose in a quote, and an empty line; nothing in it pings a channel or loads images."""
    prose = without_blank_ends(prose)
    if not prose:
        return ""
    # An image needs a ]( behind its ![: without one, vec![1] stays as it was typed.
    before, mark, after = prose.rpartition("](")
    prose = IMAGE.sub(f"!{JOINER}", before) + mark + after
    # A definition is not shown, and makes an image of a mere ![x].
    prose = DEFINITION.sub(lambda found: found[0].replace("]:", f"]{JOINER}:"), prose)
    prose = PING.sub(rf"\g<0>{JOINER}", prose)
    return "".join(f"> {line}\n" for line in prose.split("\n")) + "\n"


# Without escapes: they would push a long ticket over Mattermost's limit of 300,000 bytes.
JSON = json.JSONEncoder(ensure_ascii=False)
MESSAGE_LIMIT = 16383  # characters in a post
STATUS_LINE_BEGINS = "|".join(  # **Status:** #ticket-open, …: each line up to its tag
    re.escape("".join(status.line.partition(status.tag)[:2])) for status in STATUSES.values())
STATUS_LINE = re.compile(rf"^(?:{STATUS_LINE_BEGINS})(?![\w-]).*$", re.MULTILINE)
# As somebody may have edited it; what was typed into the form is untagged().
TAGGED_LINE = re.compile(f"^.*#{TAG_NAME}.*$", re.MULTILINE | re.IGNORECASE)


def json_bytes(value):
    """Return JSON in UTF-8."""
    return JSON.encode(value).encode("utf-8", "replace")


def ephemeral(text):
    """Return an answer that only the person who typed the command sees."""
    # Without skip_slack_parsing, a typed <!channel> would become a mention.
    return {"response_type": "ephemeral", "text": text, "skip_slack_parsing": True}


def given_back(sentence, text):
    """Return an ephemeral answer that gives people their text back."""
    return ephemeral(f"{sentence}\n{WHAT_YOU_TYPED}\n{code_block(text)}" if text else sentence)


def status_line(status, user_name):
    """Return the line of a ticket that says what has become of it."""
    return STATUSES[status].line.format(user_name=user_name)


def ticket_message(ticket_id, user_name, answers, mention="", thread_link=""):
    """Return the message of a ticket; the hashtags make its ID and its status searchable.

    `answers` are Markdown already. The status stands before them: of a post's hashtags, Mattermost
    keeps the first 1,000 characters.
    """
    lines = [f"#### #{ticket_id} · @{user_name}", status_line(NEW, user_name)]
    if thread_link:
        lines.append(THREAD.format(link=thread_link))
    if mention:
        lines.append(FOR.format(mention=mention))
    return "\n".join([*lines, answers]).rstrip("\n")


def with_status(message, status, user_name):
    """Return a ticket's message with another status line; what else was edited stays."""
    line = status_line(status, user_name)
    if old := STATUS_LINE.search(message) or TAGGED_LINE.search(message):
        return message[:old.start()] + line + message[old.end():]
    first, end, rest = message.partition("\n")
    return f"{first}\n{line}{end}{rest}"


def new_post(channel_id, message, pending_post_id, root_id="", **props):
    """Return a post that may be sent twice: Mattermost knows its pending_post_id for 30 seconds."""
    return {
        "channel_id": channel_id,
        "root_id": root_id,
        "message": message,
        "pending_post_id": pending_post_id,
        # In a post with attachments, even an empty list, Mattermost loads no preview or image of a
        # link.
        "props": {"attachments": [], **props},
    }


# -------------------------------------------------- 3. What a form may be, and what may be answered

DIALOG_BYTES = 290_000  # Mattermost takes 300,000 from us, the state included
JSON_TYPES = {str: "a text", bool: "true or false", int: "a whole number", list: "a list",
              dict: "a JSON object"}
REQUIRED_KEYS = ("title", "elements", "type", "name", "display_name", "options", "text", "value")
OUR_KEYS = ("mention", "code")
KEYS_NOT_TO_SET = ("state", "callback_id", "notify_on_cancel")
# Keys, types and data sources that Mattermost knows, and what to do instead.
UNSUPPORTED = {
    "dynamic": "let people choose from options, users or channels",
    "data_source_url": "let people choose from options, users or channels",
    "refresh": "show all elements from the beginning",
    "source_url": "show all elements from the beginning",
    "file": "people put files into the ticket's thread",
    "options": "only a select without data_source, or a radio, has them",
    "multiselect": "only a select has it",
}
# Mattermost takes these for elements of any type, and uses them for those that list them.
KEYS_OF_SOME_TYPES = ("subtype", "min_length", "max_length", "data_source", "min_date", "max_date",
                      "time_interval", "datetime_config")
SUBTYPES = ("text", "email", "number", "tel", "url")
ID = re.compile("[A-Za-z0-9]{1,64}")  # of anything in Mattermost: what may become part of a URL
USER_NAME = re.compile(r"[\w.:-]{1,64}", re.ASCII)  # a colon in those of shared channels
CHANNEL_NAME = re.compile(r"[a-z0-9_-]{1,64}")
CHOSEN_ID = re.compile("[A-Za-z0-9]{26}")  # not a word such as me, which the API knows as well
MENTION = re.compile(r"@[\w.-]+")
NUMBER = re.compile(r"[+-]?(\d++(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
DATE = re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?)?", re.ASCII)
NEAR_DAYS = {"yesterday": -1, "today": 0, "tomorrow": 1}
FROM_NOW = re.compile(r"([+-][0-9]{1,3})([dwmHMS])")  # +3d, -1w, +30M: Mattermost's own
UNITS = {"d": "days", "w": "weeks", "H": "hours", "M": "minutes", "S": "seconds"}  # of timedelta


def matching(pattern, value):
    """Return a text that a pattern matches as a whole; "" for anything else."""
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""


def fingerprint(value):
    """Return a text that is the same for the same JSON value, and for no other."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def without(thing, keys):
    """Return a JSON object without some of its keys."""
    return {key: value for key, value in thing.items() if key not in keys}


def sound_part(thing, keys, problems):
    """Return the part of a JSON object that is as it should be; add to `problems` what is not.

    `keys` are those that it may have, with their JSON types. One that says nothing (null, "", 0,
    false, []) counts as not there: programs that make forms write them all.
    """
    if not isinstance(thing, dict):
        problems.append("must be a JSON object")
        return {}
    thing = {key: value for key, value in thing.items() if value}
    for key in without(thing, keys):
        hint = UNSUPPORTED.get(key)
        problems.append(f"{key} is not supported: {hint}" if hint
                        else f"{key} is not one of {', '.join(keys)}")
    sound = {}
    for key, kind in keys.items():
        if key not in thing:
            problems += [f"{key} is missing"] if key in REQUIRED_KEYS else []
        elif problem := value_problem(key, kind, thing[key]):
            problems.append(f"{key} {problem}")
        else:
            sound[key] = thing[key]
    return sound


def value_problem(key, kind, value):
    """Return what is wrong with the value of a key, which must have a JSON type; "" if nothing."""
    if type(value) is not kind:
        return f"must be {JSON_TYPES[kind]}"
    if kind is int and not 0 < value < 2**31:
        return f"must be from 1 to {2**31 - 1}"
    if kind is str and key in REQUIRED_KEYS and not clean(value):
        return "is blank"
    if key == "mention" and not MENTION.fullmatch(value):
        return "must look like @team-or-user"
    return ""


def too_long(thing, usual):
    """Yield a note for each text of a JSON object that is longer than usual, in characters."""
    for key, most in usual.items():
        if (length := len(thing.get(key, ""))) > most:
            yield (f"{key} has {length} characters: it is shown, but Mattermost logs more than "
                   f"{most}, and a phone may cut it")


def utc_now():
    """Return the time."""
    return datetime.datetime.now(datetime.UTC)


class Name(NamedTuple):
    """What a person or a channel is called, and how a ticket shows it."""

    name: str
    markdown: str
    is_person: bool


class Element:
    """A field of the form. What a type of Mattermost's means is all in a subclass.

    `problems` says what is wrong with it.
    """

    keys = {"type": str, "name": str, "display_name": str, "help_text": str, "optional": bool,
            "default": str, "placeholder": str}
    usual = {"display_name": 24, "name": 300, "help_text": 150, "default": 150, "placeholder": 150}
    when_empty = ""  # what is meant by an answer without anything in it
    not_one = NOT_TEXT  # what is said of a value that can't be an answer

    def __init__(self, element):
        self.problems: list = []
        self.idle = [key for key in KEYS_OF_SOME_TYPES if key not in self.keys
                     and isinstance(element, dict) and element.get(key)]
        self.element = sound_part(without(element, self.idle) if self.idle else element,
                                  self.keys, self.problems)
        self.name = self.element.get("name")
        self.label = f"**{untagged(one_line(self.element.get('display_name', '')))}:**"

    def check_default(self):
        """Add to `problems` if the default would not be accepted as an answer."""
        if default := clean(self.element.get("default", "")):
            _, problem = self.read(default, utc_now())
            self.problems += [f"default {default!r:.60}: {problem}"] if problem else []

    def notes(self):
        """Yield what Mattermost takes, but does not do well."""
        for key in self.idle:
            yield f"{key} is dropped: it says nothing about a {self.element['type']}"
        yield from too_long(self.element, self.usual)

    def needs(self):
        """Yield what an older Mattermost lacks: a level, what it is, the version, and a remark.

        A "problem" is something that people can't use there.
        """
        yield from ()

    def for_mattermost(self):
        """Return the element as Mattermost knows it."""
        return without(self.element, OUR_KEYS)

    def answer_in(self, value, opened):
        """Return (the answer in a submitted value or None, what is wrong with it or None).

        `opened` is when the form was: a relative date counts from there, so that a form that is
        submitted twice means the same. Clients leave out what was not touched, or send null or "";
        a number may come as a text.
        """
        if isinstance(value, (list, dict)):
            return None, self.not_one
        if not isinstance(value, str):
            value = "" if value is None else json.dumps(value)
        text = clean(value) or self.when_empty
        return self.read(text, opened) if text else self.no_answer()

    def no_answer(self):
        """Return (None, what is wrong with an empty answer or None)."""
        return None, None if self.element.get("optional") else REQUIRED

    def read(self, text, opened):
        """Return (the answer in a text that is not empty, what is wrong with it or None)."""
        raise NotImplementedError

    def ids(self, answer):
        """Return the IDs in an answer for which markdown() has to know a Name."""
        return []

    def markdown(self, answer, names):
        """Return what a ticket says of an answer; `names` has a Name for each of its IDs."""
        return f"{self.label} {inline_code(untagged(answer))}\n"


class Text(Element):
    """A line of text."""

    keys = {**Element.keys, "subtype": str, "min_length": int, "max_length": int}
    longest = 150  # characters, if neither max_length nor the default says it

    def __init__(self, element):
        super().__init__(element)
        self.subtype = self.element.get("subtype", "text")
        self.least = self.element.get("min_length", 0)
        self.most = self.element.get("max_length") or max(
            self.longest, len(self.element.get("default", "")))
        if self.subtype not in SUBTYPES:
            self.problems.append(f"subtype must be one of {', '.join(SUBTYPES)}")
        if self.least > self.most:
            self.problems.append(f"min_length must not be more than max_length, {self.most}")

    def check_default(self):
        if self.default_fits():  # else there is a note: it may be the beginning of an answer
            super().check_default()

    def notes(self):
        yield from super().notes()
        if not self.default_fits():
            yield (f"default: people have to change it, to {self.least} characters at least, and "
                   f"{self.most} at most")

    def default_fits(self):
        """Return whether the default, if there is one, is as long as an answer has to be."""
        length = len(clean(self.element.get("default", "")))
        return not length or self.least <= length <= self.most

    def read(self, text, opened):
        problem = None
        if len(text) < self.least:
            problem = TOO_SHORT.format(limit=self.least)
        elif len(text) > self.most:
            problem = TOO_LONG.format(limit=self.most, excess=len(text) - self.most)
        elif self.subtype == "number" and not NUMBER.fullmatch(text):
            problem = NOT_A_NUMBER
        elif self.subtype == "email" and "@" not in text:
            problem = NOT_AN_EMAIL
        elif self.subtype == "url" and not ("http://" in text or "https://" in text):
            problem = NOT_A_URL
        return text, problem


class Textarea(Text):
    """Several lines: a ticket quotes them as Markdown, or shows them as typed, with `code`."""

    keys = {**Text.keys, "code": bool}
    usual = {**Text.usual, "default": 3000, "placeholder": 3000}
    longest = 3000

    def markdown(self, answer, names):
        if self.element.get("code"):
            return f"{self.label}\n{untagged(code_block(answer))}\n"
        return f"{self.label}\n{untagged(quotes_and_code(answer))}"


class Select(Element):
    """A choice of one thing, or of several with `multiselect`: of what, a subclass says."""

    keys = {**Element.keys, "multiselect": bool}
    not_one = NOT_AN_OPTION
    usual = {**Element.usual, "default": 3000, "placeholder": 3000}

    def needs(self):
        if self.element.get("multiselect"):
            yield "warning", "multiselect", (11, 0), ": with an older one, people choose one only"

    def answer_in(self, value, opened):
        if not (self.element.get("multiselect") and isinstance(value, list)):
            return super().answer_in(value, opened)
        parts = [clean(one) if isinstance(one, str) else one for one in value]
        return self.choose([self.known(one) if isinstance(one, str) else None
                            for one in parts if one not in (None, "")])

    def read(self, text, opened):
        if self.element.get("multiselect"):  # on a phone, it comes as a text with commas
            return self.choose(self.known_in(text))
        chosen = self.known(text)
        return chosen, None if chosen else self.not_one

    def choose(self, chosen):
        """Return (what was chosen, each once, or None, what is wrong with it or None).

        None in `chosen` stands for something that is no option.
        """
        if None in chosen:
            return None, self.not_one
        return (list(dict.fromkeys(chosen)), None) if chosen else self.no_answer()

    def known(self, text):
        """Return what a text chooses, or None."""
        raise NotImplementedError

    def known_in(self, text):
        """Return what a text with commas in between chooses; None where that is no option."""
        return [self.known(part) for part in map(clean, text.split(",")) if part]


class OptionSelect(Select):
    """A choice of options."""

    keys = {**Select.keys, "options": list}
    option_keys = {"text": str, "value": str, "mention": str}

    def __init__(self, element):
        super().__init__(element)
        self.options: dict = {}  # by value; blanks are no part of it here
        for number, option in enumerate(self.element.get("options", []), 1):
            problems: list = []
            option = sound_part(option, self.option_keys, problems)
            value = clean(option.get("value", ""))
            if value and value in self.options:
                problems.append("another one has the same value")
            self.options[value] = option
            self.problems += [f"option {number}: {problem}" for problem in problems]
        self.element["options"] = list(self.options.values())  # without what says nothing
        self.most_parts = max(value.count(",") for value in [*self.options, ""]) + 1

    def for_mattermost(self):
        options = [without(option, OUR_KEYS) for option in self.options.values()]
        return {**self.element, "options": options}

    def known(self, text):
        return self.options.get(text, {}).get("value")

    def known_in(self, text):
        """Return what a text with commas in between chooses; commas may be in a value, too."""
        parts, chosen, begin = text.split(","), [], 0
        while begin < len(parts):
            for end in range(begin + self.most_parts, begin, -1):
                part = clean(",".join(parts[begin:end]))
                if self.known(part):  # the longest that fits; if none does, the shortest is left
                    break
            chosen += [self.known(part)] if part else []
            begin = end
        return chosen

    def markdown(self, answer, names):
        options = [self.options[clean(value)]
                   for value in (answer if isinstance(answer, list) else [answer])]
        texts = ", ".join(inline_code(untagged(clean(option["text"]))) for option in options)
        mentions = dict.fromkeys(option["mention"] for option in options if "mention" in option)
        return " ".join([self.label, texts, *mentions]) + "\n"


class Radio(OptionSelect):
    """A choice of one option, all of which are shown."""

    keys = without(OptionSelect.keys, ["multiselect"])

    def notes(self):
        yield from super().notes()
        if "default" in self.element:
            yield "default: Mattermost 11 does not show it, but sends it"


class UserSelect(Select):
    """A choice of people, who are mentioned in the ticket."""

    keys = {**Select.keys, "data_source": str}
    data_source = "users"
    at_most = 50  # each of them is looked up
    not_seen = PERSON_NOT_SEEN

    def known(self, text):
        return matching(CHOSEN_ID, text) or None

    def choose(self, chosen):
        chosen, problem = super().choose(chosen)
        if chosen and len(chosen) > self.at_most:
            return None, TOO_MANY.format(limit=self.at_most)
        return chosen, problem

    def ids(self, answer):
        return answer if isinstance(answer, list) else [answer]

    def name_of(self, user, team_id):
        """Return the Name of what an ID stands for, in a ticket of a team; None if it has none."""
        name = matching(USER_NAME, user.get("username"))
        return Name(name, f"@{name}", is_person=True) if name else None

    def markdown(self, answer, names):
        shown = ", ".join(names[one].markdown for one in self.ids(answer))
        return f"{self.label} {shown}\n"


class ChannelSelect(UserSelect):
    """A choice of channels, to which the ticket leads."""

    data_source = "channels"
    not_seen = CHANNEL_NOT_SEEN

    def name_of(self, channel, team_id):
        name = matching(CHANNEL_NAME, channel.get("name"))
        if not name or channel.get("type") in ("D", "G"):  # direct and group messages
            return None
        if team_id and channel.get("team_id") == team_id:
            return Name(name, f"~{name}", is_person=False)
        # With its name, ~ would lead into the ticket's own team.
        shown = one_line(str(channel.get("display_name") or "")) or name
        return Name(shown, inline_code(untagged(shown)), is_person=False)


class Bool(Element):
    """A box to tick."""

    when_empty = "false"
    not_one = NOT_AN_OPTION

    def check_default(self):
        if self.element.get("default", "true") not in ("true", "false"):
            self.problems.append('default must be "true" or "false"')

    def read(self, text, opened):
        if text.lower() not in ("true", "false"):
            return None, self.not_one
        ticked = text.lower() == "true"
        return ticked, None if ticked or self.element.get("optional") else NOT_TICKED

    def markdown(self, answer, names):
        return f"{self.label} `{YES if answer else NO}`\n"


def day_meant(text, now):
    """Return the day that a text means; raise ValueError if it means none."""
    if text in NEAR_DAYS:
        return now.date() + datetime.timedelta(days=NEAR_DAYS[text])
    if (from_now := FROM_NOW.fullmatch(text)) and from_now[2] in "dw":
        return now.date() + datetime.timedelta(**{UNITS[from_now[2]]: int(from_now[1])})
    if from_now and from_now[2] == "m":
        years, month = divmod(now.month - 1 + int(from_now[1]), 12)
        year, month = now.year + years, month + 1
        return datetime.date(year, month, min(now.day, calendar.monthrange(year, month)[1]))
    return datetime.datetime.fromisoformat(text if DATE.fullmatch(text) else "").date()


def time_meant(text, now):
    """Return the time that a text means, with its zone; raise ValueError if it means none."""
    if (from_now := FROM_NOW.fullmatch(text)) and from_now[2] in "HMS":
        return now + datetime.timedelta(**{UNITS[from_now[2]]: int(from_now[1])})
    if DATE.fullmatch(text):
        moment = datetime.datetime.fromisoformat(text)
    else:
        moment = datetime.datetime.combine(day_meant(text, now), datetime.time())
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def meant(reading, text, now):
    """Return what a text means, in UTC where it has no zone; None if it means nothing."""
    with contextlib.suppress(ValueError):
        return reading(text, now)
    return None


class Date(Element):
    """A day. An answer may be relative, too: a default that nobody touched comes as it is.

    min_date and max_date are left to Mattermost's clients: only they know what "today" is for a
    person.
    """

    keys = {**Element.keys, "min_date": str, "max_date": str, "datetime_config": dict}
    config_keys = {"min_date": str, "max_date": str, "time_interval": int,
                   "location_timezone": str, "manual_time_entry": bool,
                   "allow_manual_time_entry": bool}
    not_one = NOT_A_DATE

    def __init__(self, element):
        super().__init__(element)
        problems: list = []
        config = sound_part(self.element.get("datetime_config", {}), self.config_keys, problems)
        self.problems += [f"datetime_config: {problem}" for problem in problems]
        for text in (thing[key] for thing in (self.element, config)
                     for key in ("min_date", "max_date") if key in thing):
            if not meant(time_meant, text, utc_now()):
                self.problems.append(f"{text!r} is no date")

    def needs(self):
        yield "problem", "a date", (11, 1), ": an older one does not show it"
        if "datetime_config" in self.element:
            yield "warning", "datetime_config", (11, 6), ""

    def read(self, text, opened):
        day = meant(day_meant, text, opened)
        return (day.isoformat(), None) if day else (None, self.not_one)


class DateTime(Date):
    """A day and a time of it."""

    keys = {**Date.keys, "time_interval": int}
    not_one = NOT_A_TIME

    def read(self, text, opened):
        moment = meant(time_meant, text, opened)
        if not moment:
            return None, self.not_one
        return moment.isoformat(timespec="seconds").replace("+00:00", "Z"), None

    def markdown(self, answer, names):
        moment = datetime.datetime.fromisoformat(answer)
        return f"{self.label} `{moment.date()} {moment:%H:%M %Z}`\n"


TYPES: dict = {"text": Text, "textarea": Textarea, "select": OptionSelect, "radio": Radio,
               "bool": Bool, "date": Date, "datetime": DateTime}
DATA_SOURCES: dict = {"users": UserSelect, "channels": ChannelSelect}  # of a select


def read_element(element):
    """Return an element of a form, with all that is wrong with it."""
    if not isinstance(element, dict):
        return Element(element)
    key, kinds = "type", TYPES
    if element.get("type") == "select" and element.get("data_source"):
        key, kinds = "data_source", DATA_SOURCES
    value = str(element.get(key))
    if value in kinds:
        known = kinds[value](element)
        known.check_default()
        return known
    unknown = Element({name: element[name] for name in Element.keys if name in element})
    if key == "data_source" or key in unknown.element:  # else that is a problem already
        hint = UNSUPPORTED.get(value, f"only {', '.join(kinds)}")
        unknown.problems.append(f"{key} {value!r} is not supported: {hint}")
    return unknown


class Form:
    """The dialog that people fill in: as Mattermost gets it, and what its elements mean."""

    keys = {"title": str, "submit_label": str, "introduction_text": str, "icon_url": str,
            "elements": list, "mention": str}
    usual = {"title": 24}

    def __init__(self, form, source):
        """Take a form, and where it is from; raise ValueError with all that is wrong, in lines."""
        self.source = source
        problems: list = []
        dropped = [key for key in KEYS_NOT_TO_SET if isinstance(form, dict) and form.get(key)]
        form = sound_part(without(form, dropped) if dropped else form, self.keys, problems)
        self.elements = [read_element(element) for element in form.get("elements", [])]
        names = []
        for number, element in enumerate(self.elements, 1):
            if element.name in names:
                element.problems.append("another one has the same name")
            names.append(element.name or number)
            problems += [f"element {names[-1]}: {problem}" for problem in element.problems]
        if problems:
            raise ValueError("\n".join(problems))
        self.mention = form.get("mention")
        self.dialog = {**without(form, OUR_KEYS), "callback_id": "ticket",
                       "elements": [element.for_mattermost() for element in self.elements]}
        self.bytes = len(json_bytes(self.dialog))
        if self.bytes > DIALOG_BYTES:
            raise ValueError(f"must have at most {DIALOG_BYTES} bytes in all, not {self.bytes}")
        # A dialog is judged by the form that it was opened with: one of another form is refused.
        self.fingerprint = fingerprint({
            **form, "elements": [element.element for element in self.elements]})
        self.notes = [f"{key} is dropped: it is for the service to set" for key in dropped]
        self.notes += too_long(form, self.usual)
        self.notes += [f"element {element.name}: {note}"
                       for element in self.elements for note in element.notes()]

    def needs(self, version):
        """Yield what a version of Mattermost, such as (10, 9), does not know: a level, and what."""
        for element in self.elements:
            for level, what, needed, remark in element.needs():
                if version < needed:
                    yield level, (f"element {element.name}: {what} needs Mattermost "
                                  f"{needed[0]}.{needed[1]}{remark}")

    def prefilled(self, text):
        """Return the dialog with a text in its first textarea, and whether all of it found room."""
        elements = list(self.dialog["elements"])
        for index, element in enumerate(self.elements):
            if text and isinstance(element, Textarea):
                room = (DIALOG_BYTES - self.bytes) // 2  # JSON takes two bytes for a quote
                default = text[:element.most].encode()[:room].decode(errors="ignore")
                elements[index] = {**elements[index], "default": default}
                return {**self.dialog, "elements": elements}, default == text
        return self.dialog, not text

    def answers_in(self, submission, opened):
        """Return the answers in a submission, and what is wrong with them; both by element name.

        `opened` is when the form was, in seconds since 1970.
        """
        answers, errors = {}, {}
        opened = datetime.datetime.fromtimestamp(opened, datetime.UTC)
        for element in self.elements:
            answer, problem = element.answer_in(submission.get(element.name), opened)
            if problem:
                errors[element.name] = problem
            elif answer is not None:
                answers[element.name] = answer
        return answers, errors

    def answered(self, answers):
        """Return (element, its answer) for each answer, in the order of the form."""
        return [(element, answers[element.name])
                for element in self.elements if element.name in answers]

    def markdown(self, answers, names):
        """Return the part of a ticket that shows the answers; `names` has a Name for each ID."""
        return "".join(element.markdown(answer, names)
                       for element, answer in self.answered(answers))


# -------------------------------------------------------------------------------------- 4. Settings

TOKEN = re.compile("[A-Za-z0-9]+")
PRINTABLE = re.compile("[!-~]+")


class SettingsError(Exception):
    """All that is wrong with the settings, a line each."""


def text_of_file(path, most):
    """Return the text in a file, of so many characters at most, without a byte order mark."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(most + 1)
    except UnicodeDecodeError as error:
        raise ValueError("is not a text in UTF-8") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"can't be read: {getattr(error, 'strerror', error)}") from error
    if len(text) > most:
        raise ValueError(f"is longer than {most} characters")
    return text


def read_form(path):
    """Return the form in a JSON file."""
    try:
        return Form(json.loads(text_of_file(path, 1_000_000)), "FORM_FILE")
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: line {error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def read_url(text, suffix):
    """Return an http or https URL without a slash at its end; the suffix is what we add to it."""
    url = urllib.parse.urlsplit(text)
    if not PRINTABLE.fullmatch(text) or url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("must be a URL such as https://host or http://host:8080/path, no quotes")
    if url.port == 0 or any(mark in text for mark in "@?#\"'"):
        raise ValueError("must be a URL without user name, query, fragment and quotes")
    text = url.scheme + text[len(url.scheme):].rstrip("/")  # in lower case, whatever was typed
    if text.endswith(suffix):
        raise ValueError(f"must not end in {suffix}: that is added")
    return text


def read_token(text):
    """Return a token of Mattermost's."""
    if not TOKEN.fullmatch(text):
        raise ValueError("must be letters and digits only: no quotes, no spaces")
    return text


def read_tokens(text):
    """Return one or several tokens, as bytes."""
    tokens = [read_token(token).encode() for token in re.split(r"[\s,]+", text) if token]
    if not tokens:
        raise ValueError("must hold a token")
    return tokens


def read_channel(text):
    """Return the ID of a channel."""
    if not CHOSEN_ID.fullmatch(text):
        raise ValueError("must be a channel's ID (26 letters and digits), not its name")
    return text


def read_port(text):
    """Return a port number; 0 lets the system choose one."""
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError("must be a number from 0 to 65535")
    return int(text)


def read_address(text):
    """Return an address of this machine."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise ValueError("must be an IP address, such as 127.0.0.1 or ::1, no name") from error


class Setting(NamedTuple):
    """A variable: what it means, how its text is read, and what it is without one."""

    meaning: str
    parse: Callable  # of a text; raises ValueError with what is wrong
    default: object = None  # None: there must be one
    in_file: bool = False  # whether <name>_FILE may name a file that holds it
    secret: bool = False  # whether it must not be shown


SETTINGS = {
    "MATTERMOST_URL": Setting(
        "where this service reaches Mattermost: https://mattermost.example.com",
        functools.partial(read_url, suffix="/api/v4"), in_file=True),
    "BOT_TOKEN": Setting(
        "access token of the bot account", read_token, in_file=True, secret=True),
    "SLASH_TOKEN": Setting(
        "token of the slash command; several (one per team) with commas in between",
        read_tokens, in_file=True, secret=True),
    "CALLBACK_URL": Setting(
        "where Mattermost reaches this service: http://tickets.example.com:8080",
        functools.partial(read_url, suffix="/ticket"), in_file=True),
    "PORT": Setting(
        "port to listen on; default 8080", read_port, 8080),
    "LISTEN_ADDRESS": Setting(
        "IP address to listen on; default: all of this machine", read_address, ""),
    "TICKET_CHANNEL": Setting(
        "ID of one channel for all tickets; default: where /ticket is typed",
        read_channel, "", in_file=True),
    "FORM_FILE": Setting(
        "JSON file with a form of your own; default: the built-in form", read_form, ""),
    "SSL_CERT_FILE": Setting(
        "CA certificates to trust; default: those of the system", str, ""),
}


def read_setting(environ, name):
    """Return the value of a setting, from a variable or from the file that <name>_FILE names.

    One that is blank counts as not set. Raise ValueError with what is wrong with it, a line each.
    """
    setting, text = SETTINGS[name], environ.get(name, "").strip()
    if setting.in_file and (path := environ.get(f"{name}_FILE", "").strip()):
        if text:
            raise ValueError(f"is given twice: as {name} and as {name}_FILE")
        # Where the file of a secret is named, somebody may have put the secret itself.
        file = f"of {name}_FILE" if setting.secret and "/" not in path else (
            f"of {name}_FILE {path!r}")
        try:
            text = text_of_file(path, 100_000).strip()
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if not text:
            raise ValueError(f"{file}: is empty")
    if not text and setting.default is None:
        raise ValueError(f"is missing: {setting.meaning}")
    try:
        return setting.parse(text) if text else setting.default
    except ValueError as error:
        if setting.secret:
            raise
        shown = re.sub(r"(\w+://)?.*@", "\\1\u2026@", text)[:200]  # without user name and password
        raise ValueError("\n".join(
            f"{shown!r}: {line}" for line in str(error).splitlines())) from error


def tls_context(ca_file):
    """Return what verifies certificates; ssl itself says nothing when it has nobody to trust.

    OpenSSL reads two variables of the process by itself: they are removed if they are blank.
    """
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if not os.environ.get(name, "unset").strip():
            del os.environ[name]
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        raise ValueError(f"{ca_file!r}: can't be used: {error}") from error
    # On by default from Python 3.13: it refuses private CAs that curl, Go and browsers accept.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    directory = ssl.get_default_verify_paths().capath
    certificates = context.cert_store_stats()["x509"] or (directory and os.listdir(directory))
    if not ca_file and not certificates:
        raise ValueError("is needed: this system has no CA certificates of its own")
    return context


def is_loopback(url):
    """Return whether a URL leads back to the machine that it is used on."""
    host = urllib.parse.urlsplit(url).hostname.rstrip(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


@dataclass(frozen=True)
class Settings:
    """What the environment tells the service; SETTINGS says what each variable means."""

    mattermost_url: str
    bot_token: str = field(repr=False)
    slash_tokens: list = field(repr=False)  # of bytes; what we seal is sealed with the first
    callback_url: str
    port: int
    listen_address: str  # "" for all
    ticket_channel: str  # "" for the channel where /ticket is typed
    form: Form
    tls: ssl.SSLContext | None  # None if all is http

    @classmethod
    def from_environment(cls, environ):
        """Return the settings in a mapping; raise SettingsError with all that is wrong in it."""
        problems: list = []
        good: dict = {}

        def attempt(name, work, *details):
            try:
                good[name] = work(*details)
            except (OSError, ValueError) as error:
                problems.extend(f"{name} {line}" for line in str(error).splitlines())

        for name in SETTINGS:
            attempt(name, read_setting, environ, name)
        if good.get("FORM_FILE") == "":
            attempt("FORM", Form, FORM, "FORM")
        ca_file = good.pop("SSL_CERT_FILE")  # which is there: its parse, str, takes anything
        if ca_file or good.get("MATTERMOST_URL", "").startswith("https:"):
            attempt("SSL_CERT_FILE", tls_context, ca_file)  # from here on, this is the context
        if good.get("BOT_TOKEN", "").encode() in good.get("SLASH_TOKEN", []):
            problems.append("SLASH_TOKEN is the bot's token: it must be that of the slash command")
        if problems:
            raise SettingsError("\n".join(problems))
        return cls(
            mattermost_url=good["MATTERMOST_URL"], bot_token=good["BOT_TOKEN"],
            slash_tokens=good["SLASH_TOKEN"], callback_url=good["CALLBACK_URL"],
            port=good["PORT"], listen_address=good["LISTEN_ADDRESS"],
            ticket_channel=good["TICKET_CHANNEL"], form=good["FORM_FILE"] or good["FORM"],
            tls=good.get("SSL_CERT_FILE"))


# ----------------------------------------------------------- 5. Reading: what Mattermost says to us

FORM_FIELDS = 1000  # Mattermost repeats keys for everybody who is mentioned in the text
JSON_BRACKETS = 500  # that may be open at a time: each takes a part of a thread's stack
JSON_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
TOKEN_FIELD = re.compile(rb"(?:^|&)token=([^&]*)")
HOOK = re.compile(r"/([A-Za-z0-9]+)$")


class Sorry(Exception):
    """Something that a person in Mattermost has to know; str() is the sentence they read.

    The log gets that sentence, or what `log` says instead.
    """

    def __init__(self, sentence, log=None):
        super().__init__(sentence)
        self.log = str(log or sentence)


class Refused(Exception):
    """An HTTP request that Mattermost would not send; str() is the reason, for whoever sent it.

    The log gets the reason, and what `log` adds to it.
    """

    def __init__(self, status, reason, *headers, log=""):
        super().__init__(reason)
        self.status, self.headers = status, headers
        self.log = f"{reason}: {log}" if log else reason


def brackets_in(text):
    """Return how many brackets could be open at a time in a JSON text."""
    return text.count("[") + text.count("{")


def json_object(body):
    """Return the JSON object in the body of a request."""
    try:
        # json would also take UTF-16 and UTF-32, in which the brackets can't be counted as here.
        text = body.decode()
        # People paste JSON and stack traces into a ticket; what is nested could crash the thread.
        if (brackets_in(text) > JSON_BRACKETS
                and brackets_in(JSON_STRING.sub("", text)) > JSON_BRACKETS):
            raise Refused(400, "the JSON is nested too deeply")
        value = json.loads(text)
    except ValueError as error:
        raise Refused(400, "the body is not JSON") from error
    if not isinstance(value, dict):
        raise Refused(400, "the body is not a JSON object")
    return value


def token_fault(token, slash_tokens):
    """Return what is wrong with the token of a slash command, for the log; "" if it is known."""
    def is_known(token):  # sum, not any: how long it takes must not tell which one it is
        return sum(hmac.compare_digest(token, known) for known in slash_tokens)

    if is_known(token):
        return ""
    if not token:
        return "it sent none"
    if is_known(token.strip(b"\"' ")):
        return "it sent one of ours, in quotes"
    if len(token) not in map(len, slash_tokens):
        return f"it sent one of {len(token)} characters"
    return "it sent another one"


@dataclass(frozen=True)
class SlashCommand:
    """`/ticket`, as somebody typed it; Mattermost has checked who and where.

    https://developers.mattermost.com/integrate/slash-commands/custom/
    """

    user_id: str
    user_name: str
    channel_id: str
    team_id: str
    root_id: str  # of the thread it was typed in, from Mattermost 11 on; else ""
    trigger_id: str
    text: str
    hook: str  # ID of the response URL; its host is never used, since a client can choose it

    @classmethod
    def from_body(cls, body, settings):
        """Read the body, a form; its token must be one of ours."""
        # Looked at first: to read all of a form takes a hundred times as long.
        match = TOKEN_FIELD.search(body)
        token = urllib.parse.unquote_to_bytes(match[1]) if match else b""
        if fault := token_fault(token, settings.slash_tokens):
            raise Refused(
                401, "SLASH_TOKEN does not hold the token of this slash command", log=fault)
        try:
            fields = dict(urllib.parse.parse_qsl(
                body.decode(), keep_blank_values=True, max_num_fields=FORM_FIELDS))
        except ValueError as error:
            raise Refused(400, "the body is not a form") from error
        user_id, channel_id, team_id, root_id = (matching(ID, fields.get(name)) for name in (
            "user_id", "channel_id", "team_id", "root_id"))
        user_name = matching(USER_NAME, fields.get("user_name"))
        trigger_id = fields.get("trigger_id")
        if not (user_id and channel_id and user_name and trigger_id):
            raise Refused(400, "user_id, user_name, channel_id or trigger_id is missing or odd")
        hook = HOOK.search(fields.get("response_url", ""))
        return cls(
            user_id=user_id, user_name=user_name, channel_id=channel_id, team_id=team_id,
            root_id=root_id, trigger_id=trigger_id, text=clean(fields.get("text", "")),
            hook=hook[1] if hook else "")


@dataclass(frozen=True)
class Submission:
    """A dialog, as somebody submitted it. Nothing in it can be trusted before its state is opened.

    https://developers.mattermost.com/integrate/plugins/interactive-dialogs/#dialog-submission
    """

    user_id: str
    team_id: str
    state: str
    answers: dict
    cancelled: bool

    @classmethod
    def from_body(cls, body, _):
        """Read the body, a JSON object; what has the wrong type counts as empty."""
        fields = json_object(body)
        if fields.get("type") not in (None, "", "dialog_submission"):  # a look-up or a refresh
            fields = {}
        answers = fields.get("submission")
        user_id, team_id = (matching(ID, fields.get(name)) for name in ("user_id", "team_id"))
        return cls(user_id, team_id, matching(PRINTABLE, fields.get("state")),
                   answers if isinstance(answers, dict) else {}, fields.get("cancelled") is True)


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
        return cls(matching(USER_NAME, fields.get("user_name")),
                   matching(ID, fields.get("post_id")),
                   matching(PRINTABLE, context.get("signed") if isinstance(context, dict) else ""))


# ----------------------------------------------------------------------------------------- 6. Trust

DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's: none looks like another
TICKET_ID = re.compile(rf"Ticket-[0-9]{{8}}-[{DIGITS}]{{4}}")
IDS_PER_DAY = len(DIGITS) ** 4
DAY, HOUR = 24 * 60 * 60, 60 * 60  # seconds; the day is also how old a state may be


class Seal:
    """Signs what passes through other hands and must come back unchanged.

    The keys are derived from the slash tokens, which prove that a request is Mattermost's: so the
    bot's token can change, and a slash token too, as long as the old one stands behind the new.
    To derive them in another way, or to rename a purpose, would break the buttons of all tickets
    that there are.
    """

    def __init__(self, slash_tokens):
        self.keys = [hmac.digest(token, b"mattermost-ticket", "sha256") for token in slash_tokens]

    def sign(self, purpose, *fields):
        """Return a text that holds the fields and can only be opened for the same purpose."""
        payload = base64.urlsafe_b64encode(json_bytes(fields)).decode()
        return f"{payload}.{self.signatures(purpose, payload)[0]}"

    def open(self, purpose, text):
        """Return the fields in an ASCII text, a list; None if not signed by us for this purpose."""
        payload, _, signature = text.partition(".")
        known = self.signatures(purpose, payload)
        if not sum(hmac.compare_digest(signature, one) for one in known):
            return None
        return json.loads(base64.urlsafe_b64decode(payload))

    def signatures(self, purpose, payload):
        """Return the signatures of a payload, as texts: that of the first key is the one to use."""
        signed = (hmac.digest(key, f"{purpose}.{payload}".encode(), "sha256") for key in self.keys)
        return [base64.urlsafe_b64encode(one).decode() for one in signed]


class State(NamedTuple):
    """Who asked for a ticket, where and when: what a dialog's state says, in this order."""

    user_id: str
    user_name: str
    channel_id: str  # where /ticket was typed
    root_id: str  # in which thread, or ""
    time: int  # when, in seconds
    form: str  # fingerprint of the form that was opened
    nonce: str  # one for each dialog


def opened_state(seal, submission, form):
    """Return a submission's state; be Sorry if it is not ours, of this user and form, or old."""
    fields = seal.open("state", submission.state) or ()
    state = State(*fields) if len(fields) == len(State._fields) else None
    if not (state and state.user_id == submission.user_id and state.form == form.fingerprint
            and time.time() - state.time <= DAY):
        raise Sorry(FORM_INVALID)
    return state


class TicketIds:
    """Ticket-YYYYMMDD-XXXX: the day (UTC) and its 1,048,576 IDs, spread evenly over the hours.

    So IDs sort by time and need no storage. The next one is that of now or, if that is later, the
    one after the last. (A last one that lies more than an hour ahead came of a wrong reading of the
    clock, and does not count.)
    """

    def __init__(self, clock=time.time):
        self.clock, self.lock = clock, threading.Lock()
        self.last = -1  # number of the last ID, counted from 1970

    def next(self):
        """Return the next ID."""
        with self.lock:
            now = int(self.clock() * IDS_PER_DAY / DAY)
            if self.last > now + IDS_PER_DAY * HOUR / DAY:
                self.last = -1
            number = max(self.last + 1, now)
            if number > now and number % IDS_PER_DAY == 0:
                raise Sorry(DAY_FULL)
            self.last = number
        day, number = divmod(number, IDS_PER_DAY)
        date = time.strftime("%Y%m%d", time.gmtime(day * DAY))
        return f"Ticket-{date}-" + "".join(DIGITS[number >> shift & 31] for shift in (15, 10, 5, 0))

    def ahead(self):
        """Return for how many seconds the clock is still behind the last ID; 0 if it is not."""
        seconds = (self.last + 1) * DAY / IDS_PER_DAY - self.clock()
        return seconds if 0 < seconds <= HOUR else 0


# ------------------------------------------------------------------------- 7. Mattermost's REST API

USER_AGENT = "Mattermost-Ticket"  # bot lists refuse Python-urllib
ANSWER_LIMIT = 2**20  # bytes of an answer that are read
POSTS = 1000  # that Mattermost lists at most
POSTS_LIMIT = 16 * 2**20  # bytes of such a list
ERROR_ID = re.compile(r"[a-z0-9_.]{1,100}")
PROXY_LOGIN = "Proxy-authorization"  # as urllib writes this header
HOPELESS = re.compile("CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER")  # OpenSSL's words
TUNNEL_REFUSED = re.compile(r"Tunnel connection failed: (\d{3})")  # by a proxy; http.client's words
NO_API = "api.context.404.app_error"  # an address of Mattermost's, but none of its API
# Mattermost's names for errors, as far as they mean something here.
MEANINGS = {
    "api.channel.add_user_to_channel.type.app_error": "not to be joined",  # direct, group
    "api.post.create_post.can_not_post_to_deleted.error": "archived",
    "app.channel.get_member.missing.app_error": "no member",
    "interactive_message.decode_trigger_id.expired": "too late",
    "model.post.is_valid.message_length.app_error": "too long",
    "model.post.is_valid.msg.app_error": "too long",  # up to Mattermost 9
}


class MattermostError(Exception):
    """A call that Mattermost did not answer with success. str() is for the log.

    | who answered                     | how                       | may pass | may have worked |
    |----------------------------------|---------------------------|----------|-----------------|
    | nobody                           | no connection was made    | yes      | no              |
    | nobody                           | a bad certificate, no TLS | no       | no              |
    | nobody                           | silence, half an answer   | yes      | yes             |
    | a proxy, before any connection   | a status                  | as below | no              |
    | whoever it is                    | 408, 429                  | yes      | no              |
    | whoever it is                    | 5xx                       | yes      | yes             |
    | Mattermost: its errors have IDs  | 4xx                       | no       | no              |
    | something else: `foreign`        | 3xx, 4xx                  | no       | no              |
    | something else: `foreign`        | 2xx                       | no       | yes             |

    `status` is None if there was no answer; `meaning` is one of MEANINGS, or "". `words` are
    Mattermost's own, where they may be shown.
    """

    def __init__(self, reason, status=None, *, error_id="", words="", hint="", retry_after=None,
                 connected=True, hopeless=False):
        self.status, self.meaning = status, MEANINGS.get(error_id, "")
        self.words, self.retry_after = words, retry_after  # one line; seconds
        self.by_mattermost = bool(error_id)
        if status is None:
            self.may_pass, self.may_have_worked = not hopeless, connected
        else:
            self.may_pass = status in (408, 429) or status >= 500
            self.may_have_worked = connected and (status < 300 or status >= 500)
        self.foreign = not (status is None or self.may_pass or self.by_mattermost)
        if self.foreign and connected:
            reason += f", but not as Mattermost does: {hint or 'is MATTERMOST_URL right?'}"
        super().__init__(f"{reason}: {words}" if words else reason)


class NotAllowed(MattermostError):
    """A call about something that is not there for the bot: Mattermost says 400, 403 or 404."""


class NotConnected(OSError):
    """There was no connection, for the reason that is its argument: so nothing was asked."""


def unanswered_call(error, peer):
    """Return the error of a call without an answer; `peer` says who was asked, for the log."""
    connected = not isinstance(error, NotConnected)
    cause = error if connected else error.args[0]
    refused = TUNNEL_REFUSED.search(str(cause))
    return MattermostError(
        f"no answer of {peer}: {cause!r:.300}", int(refused[1]) if refused else None,
        connected=connected, hopeless=bool(HOPELESS.search(str(cause))))


def redirected_to(answer, url):
    """Return the URL that an answer leads to from another one, without what may be secret.

    "" if it leads nowhere, or back to where it was asked for.
    """
    try:
        target = urllib.parse.urlsplit(
            urllib.parse.urljoin(url, answer.headers.get("Location", "")))
    except ValueError:  # it is no URL
        return ""
    host = target.netloc.rpartition("@")[2]  # without user name and password
    found = f"{target.scheme}://{host}{target.path}"
    return "" if found == url.partition("?")[0] else found


def redirect_hint(answer, url):
    """Return what a redirect says of MATTERMOST_URL, when a URL of the API was asked for."""
    if not (target := redirected_to(answer, url)):
        return ""
    path = url.partition("?")[0]
    api = path[path.find("/api/v4/"):]
    with contextlib.suppress(ValueError):  # it could not be MATTERMOST_URL
        if target.endswith(api):
            right = read_url(target.removesuffix(api), api)
            return f"it leads to {target}, so MATTERMOST_URL may have to be {right}"
    return f"it leads to {target}: is MATTERMOST_URL right?"


def refused_call(answer, url, peer):
    """Return the error in an answer; `peer` says who was asked, for the log."""
    try:
        fields = json.loads(answer.body)
        error_id, words = fields["id"], fields.get("message")
    except (ValueError, LookupError, TypeError, RecursionError):
        error_id, words = "", ""
    if error_id == NO_API or not isinstance(error_id, str):
        error_id = ""
    reason = f"{peer} answered {answer.status}"
    if ERROR_ID.fullmatch(error_id):  # plugins put their own words there
        reason += f" {error_id}"
    # The URL of a response hook is a secret, which an answer may repeat: so Mattermost's words are
    # kept for posts only, and where a redirect leads, for the API only.
    words = one_line(words) if url.endswith("/api/v4/posts") and isinstance(words, str) else ""
    redirected = 300 <= answer.status < 400 and "/api/v4/" in url
    hint = one_line(redirect_hint(answer, url)) if redirected else ""
    wait = answer.headers.get("Retry-After", "")
    kind = NotAllowed if error_id and answer.status in (400, 403, 404) else MattermostError
    return kind(
        reason, answer.status, error_id=error_id, words=words, hint=hint,
        retry_after=float(wait) if re.fullmatch("[0-9]+", wait) else None)  # it may be a date


class Call(urllib.request.Request):
    """A request to Mattermost."""

    limit: int  # bytes of its answer that are read at most
    may_repeat: bool  # whether it may be sent twice


class Answer(NamedTuple):
    """An answer of Mattermost's, read to its end."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @classmethod
    def whole(cls, response, limit):
        """Read a response; raise if it is cut short, or too long."""
        with response:
            body = response.read(limit + 1)
        if len(body) > limit:
            raise ValueError("the answer is too long")
        if response.length:  # bytes that are still owed: read() with a size does not tell
            raise http.client.IncompleteRead(body, response.length)
        return cls(response.status, response.headers, body)


class KeptConnections(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens http and https URLs on connections that are kept for the next call.

    A new TLS connection costs more time than all else in a call. One that dies may have brought
    its request. Nearly all of ours may be sent again at once: a GET, a dialog, and what only one
    person sees. But a Mattermost that has just been restarted would make a post twice.
    """

    most, longest = 64, 10  # idle connections, and for how many seconds they are kept

    def __init__(self, context):
        super().__init__(context=context)
        self.idle: collections.deque = collections.deque()

    def do_open(self, http_class, req, **http_conn_args):
        """Return the answer, read to its end; urllib's own do_open() leaves that to the caller."""
        headers, for_proxy = dict(req.header_items()), {}
        host = urllib.parse.urlsplit(req.full_url).netloc
        # ProxyHandler puts a proxy into req.host; has_proxy() is true only if the URL is http.
        through_tunnel = req.host != host and not req.has_proxy()
        if through_tunnel and PROXY_LOGIN in headers:
            for_proxy[PROXY_LOGIN] = headers.pop(PROXY_LOGIN)
        if kept := self.take():
            try:
                return self.exchange(kept, req, headers)
            except TimeoutError:
                self.close()  # the others may be as dead
                raise
            except (OSError, http.client.HTTPException):
                if not req.may_repeat:
                    raise
        connection = http_class(req.host, timeout=req.timeout, **http_conn_args)
        if through_tunnel:
            connection.set_tunnel(host, headers=for_proxy)
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NotConnected(error) from error
        return self.exchange(connection, req, headers)

    def exchange(self, connection, request, headers):
        """Send a request, return its answer, and keep the connection if the other side does."""
        try:
            connection.sock.settimeout(request.timeout)
            connection.request(request.get_method(), request.selector, request.data, headers)
            answer = Answer.whole(connection.getresponse(), request.limit)
        except BaseException:
            connection.close()
            raise
        if connection.sock:  # http.client has dropped it if the answer said Connection: close
            self.keep(connection)
        return answer

    def keep(self, connection):
        """Keep an idle connection for the next call; close those that were kept for long."""
        now = time.monotonic()
        self.idle.append((connection, now))
        with contextlib.suppress(IndexError):  # another thread was faster
            while len(self.idle) > self.most or now - self.idle[0][1] > self.longest:
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
    patience = 20  # seconds, for all tries of a post
    pause = 0.5  # seconds before the second try

    def __init__(self, settings):
        self.url, self.site_url = settings.mattermost_url, ""
        self.headers = {"Authorization": f"Bearer {settings.bot_token}",
                        "Content-Type": "application/json",
                        "User-Agent": USER_AGENT}
        url = urllib.parse.urlsplit(self.url)
        proxy = urllib.request.getproxies().get(url.scheme, "").strip()
        if proxy and urllib.request.proxy_bypass(url.netloc):
            proxy = ""
        self.peer = url.netloc  # who is asked, for the log
        if proxy:
            host = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}").netloc
            host = host.rpartition("@")[2]  # without name and password
            self.peer += f" (through the proxy {host}: is NO_PROXY meant?)"
        # With context=None, urllib would load all CA certificates even for http.
        self.connections = KeptConnections(
            settings.tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        # Bare: urllib's usual opener follows redirects, to any host and with our token.
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(self.connections)
        if proxy:
            self.opener.add_handler(urllib.request.ProxyHandler())

    def send(self, method, path, payload=None, limit=ANSWER_LIMIT):
        """Return the body of an answer that means success."""
        data = None if payload is None else json_bytes(payload)
        request = Call(self.url + path, data, self.headers, method=method)
        request.limit, request.may_repeat = limit, path != "/api/v4/posts"
        try:
            answer = self.opener.open(request, timeout=self.timeout)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise unanswered_call(error, self.peer) from error
        if answer.status not in (200, 201):
            raise refused_call(answer, request.full_url, self.peer)
        return answer.body

    def call(self, method, path, payload=None, wanted=dict, limit=ANSWER_LIMIT):
        """Return the JSON in an answer that means success: an object, or whatever is wanted."""
        body = self.send(method, "/api/v4" + path, payload, limit)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, wanted):
            raise self.odd_answer()
        return answer

    def call_for_id(self, method, path, payload=None):
        """Return the JSON object in an answer that means success, if it has an ID."""
        answer = self.call(method, path, payload)
        if not matching(ID, answer.get("id")):
            raise self.odd_answer()
        return answer

    def odd_answer(self):
        """Return the error for an answer that means success, but that Mattermost would not give."""
        return MattermostError(f"{self.peer} answered", 200)

    def get_client_config(self):
        """Return the public configuration: `Version`, `SiteURL`, …, all of them texts."""
        config = self.call("GET", "/config/client?format=old")
        if not isinstance(config.get("Version"), str):
            raise self.odd_answer()
        return config

    def link(self, post_id):
        """Return the address of a post, for people; raise nothing."""
        if not self.site_url:
            try:
                site_url = str(self.get_client_config().get("SiteURL"))
                self.site_url = site_url.rstrip("/") if site_url.startswith("http") else ""
            except MattermostError as error:
                log.warning("the site URL is not known: %s", error)
        return f"{self.site_url or self.url}/_redirect/pl/{post_id}"

    def get_me(self):
        """Return the bot's user: `id`, `username`, `roles`, `is_bot`, …"""
        return self.call_for_id("GET", "/users/me")

    def get_user(self, user_id):
        """Return a user: `username`, …"""
        return self.call_for_id("GET", f"/users/{user_id}")

    def get_my_teams(self):
        """Return the bot's teams: `id`, `name`, …"""
        teams = self.call("GET", "/users/me/teams", wanted=list)
        return [team for team in teams if isinstance(team, dict)]

    def get_channel(self, channel_id):
        """Return a channel: `type` (O, P, D, G), `name`, …; public, or one the bot is in."""
        return self.call("GET", f"/channels/{channel_id}")

    def get_channel_member(self, channel_id, user_id="me"):
        """Return a membership; 404 if there is none, 403 for all if the bot has none."""
        return self.call("GET", f"/channels/{channel_id}/members/{user_id}")

    def add_channel_member(self, channel_id, user_id):
        """Let the bot join: 201 for public channels of its teams."""
        return self.call("POST", f"/channels/{channel_id}/members", {"user_id": user_id})

    def get_my_team_member(self, team_id):
        """Return the bot's membership in a team: `roles`, …"""
        return self.call("GET", f"/teams/{team_id}/members/me")

    def get_roles_by_names(self, names):
        """Return roles: `name`, `permissions`, …; an error if Mattermost knows none of them."""
        return self.call("POST", "/roles/names", names, wanted=list)

    def get_channel_posts(self, channel_id, since):
        """Return posts of a channel since a time in milliseconds, replies too; POSTS at most."""
        answer = self.call(
            "GET", f"/channels/{channel_id}/posts?since={since}", limit=POSTS_LIMIT)
        posts = answer.get("posts")
        return list(posts.values()) if isinstance(posts, dict) else []

    def create_post(self, post):
        """Return a post as it has been made: `id`, `props`, …"""
        return self.call_for_id("POST", "/posts", post)

    def patiently(self, work):
        """Return what work() returns; while Mattermost is away, call it again and again."""
        pause, ends = self.pause, time.monotonic() + self.patience
        while True:
            try:
                return work()
            except MattermostError as error:
                wait = error.retry_after or pause
                if not error.may_pass or time.monotonic() + wait + self.timeout > ends:
                    raise
            time.sleep(wait)
            pause = min(2 * pause, 2)

    def get_post(self, post_id):
        """Return a post: `user_id`, `message`, `props`, …; without what its buttons carry."""
        return self.call_for_id("GET", f"/posts/{post_id}")

    def create_ephemeral_post(self, user_id, channel_id, message):
        """Show a message to one person; only privileged bots may."""
        post = {"channel_id": channel_id, "message": message}
        return self.call("POST", "/posts/ephemeral", {"user_id": user_id, "post": post})

    def open_dialog(self, trigger_id, url, dialog):
        """Open a dialog for the person whose command the trigger belongs to."""
        opening = {"trigger_id": trigger_id, "url": url, "dialog": dialog}
        return self.call("POST", "/actions/dialogs/open", opening)

    def answer_command(self, hook, answer):
        """Answer a slash command later: Mattermost lets us five times, within half an hour."""
        self.send("POST", f"/hooks/commands/{hook}", answer)


# -------------------------------------------------------------------------------------- 8. Channels

REMEMBERED = 10_000  # of each: channels, dialogs, presses


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


class Channels:
    """Where the bot may post: finds out, joins where it must, and remembers the good ones."""

    def __init__(self, mattermost, ticket_channel):
        self.mattermost, self.ticket_channel = mattermost, ticket_channel
        self.good = Recent()

    def target(self, channel_id):
        """Return the channel that gets the ticket of somebody who typed /ticket in a channel."""
        return self.ticket_channel or channel_id

    def ensure(self, channel_id, after, team_id=""):
        """Be Sorry if the bot can't post in a channel, after a "command" or a "submission".

        `team_id` says where /ticket was typed, if that is known. A channel that Mattermost says
        nothing about is good until it refuses a post.
        """
        if channel_id in self.good:
            return
        try:
            me = self.mattermost.get_me()
            obstacle = self.obstacle(channel_id, me, "" if self.ticket_channel else team_id)
        except MattermostError as error:
            if error.status == 401 and error.by_mattermost:
                raise Sorry(BAD_TOKEN, log=error) from error
            log.warning("channel=%s could not be looked at: %s", channel_id, error)
            return
        if obstacle:
            raise self.sorry(obstacle, after, me)
        self.good.remember(channel_id, True)

    def sorry(self, obstacle, after, me):
        """Return what a person, and the log, are told of an obstacle."""
        bot = matching(USER_NAME, me.get("username"))
        where = "TICKET_CHANNEL" if self.ticket_channel else "the channel"
        return Sorry(CANT_POST[obstacle][self.key(after)].format(bot=bot),
                     log=f"{where}: {CANT_POST[obstacle]['admin'].format(bot=bot)}")

    def key(self, after):
        """Return the key of a sentence in CANT_POST, after a "command" or a "submission"."""
        return "ticket channel" if self.ticket_channel else after

    def obstacle(self, channel_id, me, team_id=""):
        """Return why the bot can't post in a channel, a key of CANT_POST; "" if it can, now."""
        channel = {}
        try:
            channel = self.mattermost.get_channel(channel_id)
        except NotAllowed as error:
            if error.status == 404:
                return "unknown"  # else it is private, and the bot is not in it
        if channel.get("delete_at"):  # an archived channel can be joined all the same
            return "archived"
        # A direct message with the bot: nobody else would see the ticket. A group message with the
        # bot is as good as a channel; one without it is found out below.
        if channel.get("type") == "D":
            return "direct"
        public = channel.get("type") == "O"
        try:
            member = self.member(channel_id, me["id"])
        except NotAllowed as error:
            roles = str(me.get("roles")).split()
            if "system_post_all" in roles or (public and "system_post_all_public" in roles):
                return ""
            if error.meaning == "not to be joined":
                return "direct"
            return "not a member" if self.is_in_team(team_id) else "not in the team"
        return "" if self.may_post(channel, member, me) else "read only"

    def is_in_team(self, team_id):
        """Return whether the bot is in a team; of one that is not known, it may be."""
        with contextlib.suppress(MattermostError):
            return not team_id or any(
                team.get("id") == team_id for team in self.mattermost.get_my_teams())
        return True

    def member(self, channel_id, user_id):
        """Return the bot's membership in a channel, a new one if need be."""
        with contextlib.suppress(NotAllowed):
            return self.mattermost.get_channel_member(channel_id)
        return self.mattermost.add_channel_member(channel_id, user_id)

    def may_post(self, channel, member, me):
        """Return whether a role lets the bot post; what can't be read counts as one that does."""
        needed = {"create_post", "create_post_public"} if channel.get("type") == "O" else {
            "create_post"}
        try:
            memberships = [me, member]
            if team_id := matching(ID, channel.get("team_id")):  # a group message has none
                memberships.append(self.mattermost.get_my_team_member(team_id))
            if not all(membership["roles"] for membership in memberships):  # these tell nothing
                return True
            names = " ".join(membership["roles"] for membership in memberships).split()
            known = {role["name"]: role["permissions"]
                     for role in self.mattermost.get_roles_by_names(names)}
            return any(needed.intersection(known[name]) for name in names)
        except (MattermostError, LookupError, TypeError, AttributeError):
            return True

    def create_post(self, post, team_id=""):
        """Return a post as it has been made; where the bot is no longer a member, join first."""
        channel_id = post["channel_id"]
        try:
            return self.mattermost.create_post(post)
        except NotAllowed as error:
            self.good.forget(channel_id)
            if error.status != 403:
                raise
        self.ensure(channel_id, "submission", team_id)
        try:
            return self.mattermost.create_post(post)
        except NotAllowed as error:
            self.good.forget(channel_id)
            if error.status == 403:
                raise self.sorry("read only", "submission", self.mattermost.get_me()) from error
            raise

    def reply(self, channel_id, root_id, message, pending_post_id=None):
        """Post in a thread."""
        post = new_post(channel_id, message, pending_post_id or secrets.token_urlsafe(24), root_id)
        self.mattermost.patiently(lambda: self.create_post(post))


# -------------------------------------------------------------------------------------- 9. The desk

def is_ticket(post, nonces):
    """Return whether what Mattermost calls a post is a ticket with one of these nonces."""
    try:
        props = post["props"]
        return bool(props["ticket"]["nonce"] in nonces and matching(ID, post["id"])
                    and matching(TICKET_ID, props["ticket_id"]))
    except (LookupError, TypeError):
        return False


def sentence_for(error, again, refused):
    """Return what a person is told of a failed call: `again` if it may pass, else `refused`."""
    if error.may_pass:
        return again
    if error.status is None:
        return NOT_SECURE
    if error.foreign:
        return IN_PLACE if error.status < 300 else IN_BETWEEN.format(status=error.status)
    return BAD_TOKEN if error.status == 401 else refused


def milliseconds():
    """Return the time as Mattermost writes it."""
    return int(time.time() * 1000)


class Change(NamedTuple):
    """What a press makes of a ticket, or has made of it. The ticket's props have the same names."""

    status: str
    status_by: str  # user name
    status_at: int  # milliseconds


@dataclass(slots=True)
class LastPress:
    """The last press of a ticket's buttons: held while it is judged."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    change: Change | None = None  # if it was answered, and the post was not seen to show it so far


class Presses:
    """Take, close and reopen: what becomes of a ticket by its buttons.

    | a press is  | if                                                   | then                   |
    |-------------|------------------------------------------------------|------------------------|
    | not ours    | the seal, the post or its props are not              | nothing is changed     |
    | outdated    | the ticket has got another status since its button   | the person is told who |
    | late        | LateHandler has answered: nothing was changed        | nothing is changed     |
    | answered    | else                                                 | the answer changes it  |
    | true        | the post shows the change, as we read it again       | the thread is told     |
    | lost        | it does not: Mattermost has lost our answer          | the press is forgotten |

    Mattermost changes the post when it has our answer. Who presses in between reads the old post:
    so an answered press is remembered until it is true, or lost.
    """

    shown_within = 5  # seconds after the answer
    first_look = 0.05  # seconds after the answer; each pause is twice as long, up to a second

    def __init__(self, mattermost, seal, channels, url):
        self.mattermost, self.seal, self.channels, self.url = mattermost, seal, channels, url
        self.last = Recent()

    def buttons(self, ticket_id, ticket):
        """Return the attachments of a ticket with such props: what leads on from its status.

        A button's context comes back with a press; Mattermost shows it to nobody.
        """
        status = STATUSES[ticket["status"]]
        actions = [{
            "id": wanted, "name": STATUSES[wanted].button, "type": "button",
            "integration": {"url": self.url, "context": {
                "signed": self.seal.sign("action", ticket_id, ticket["status_at"], wanted)}},
        } for wanted in status.leads_to]
        return [{"color": status.color, "actions": actions}]

    def on_press(self, press):
        """Give a ticket another status; yield the answer to the button, then tell the thread.

        As with all that reacts to a request, Handler.answer_person() takes the answer, sends it,
        and comes back with whether this was the first answer: what stands behind a yield is done
        after that.
        """
        fields = self.seal.open("action", press.signed)
        if not (fields and len(fields) == 3 and press.user_name and press.post_id):
            raise Sorry(NOT_OUR_BUTTON)
        ticket_id, status_at, wanted = fields
        last = self.last.remember(ticket_id, LastPress())
        with last.lock:
            post = self.ticket_post(press.post_id, ticket_id)
            now = last.change or self.shown(post)
            same = (wanted, press.user_name) == (now.status, now.status_by)
            if now.status_at != status_at or same or wanted not in STATUSES[now.status].leads_to:
                raise Sorry(STATUSES[now.status].already.format(user_name=now.status_by))
            change = Change(wanted, press.user_name, max(milliseconds(), status_at + 1))
            answered = yield {"update": self.changed(post, change)}
            if not answered:
                return
            last.change = change
        try:
            self.tell_thread(post, change)
        finally:
            with last.lock:  # not while a press is judged that has read the old post
                if last.change is change:
                    last.change = None

    def ticket_post(self, post_id, ticket_id):
        """Return the post of a ticket as it is now, if the bot has written it."""
        try:
            post, me = self.mattermost.get_post(post_id), self.mattermost.get_me()
        except MattermostError as error:
            refused = NOT_READABLE if isinstance(error, NotAllowed) else NOT_READ
            raise Sorry(sentence_for(error, PRESS_AGAIN, refused), log=error) from error
        if not (self.shown(post) and post["props"].get("ticket_id") == ticket_id
                and post.get("user_id") == me["id"] and isinstance(post.get("message"), str)
                and matching(ID, post.get("channel_id"))):
            raise Sorry(NOT_OUR_BUTTON)
        return post

    def shown(self, post):
        """Return what a ticket's post says that it is, a Change; None if it says nothing of it."""
        try:
            ticket = post["props"]["ticket"]
            shown = Change(*(ticket[name] for name in Change._fields))
            sound = (shown.status in STATUSES and matching(USER_NAME, shown.status_by)
                     and isinstance(shown.status_at, int))
        except (LookupError, TypeError):
            return None
        return shown if sound else None

    def changed(self, post, change):
        """Return the update of a ticket's post: message, props and buttons; the rest stays."""
        ticket = {**post["props"]["ticket"], **change._asdict()}
        props = {**post["props"], "ticket": ticket,
                 "attachments": self.buttons(post["props"]["ticket_id"], ticket)}
        return {"message": with_status(post["message"], change.status, change.status_by),
                "props": props}

    def tell_thread(self, post, change):
        """Tell everybody who follows a ticket what has become of it, once it has."""
        ticket_id = post["props"]["ticket_id"]
        if not self.becomes_true(post["id"], change):
            log.warning("ticket=%s was not seen to become %s by user=%s: Mattermost may have lost "
                        "the answer", ticket_id, change.status, change.status_by)
            return
        log.info("ticket=%s status=%s user=%s", ticket_id, change.status, change.status_by)
        try:
            self.channels.reply(
                post["channel_id"], post["id"],
                STATUSES[change.status].reply.format(user_name=change.status_by))
        except (Sorry, MattermostError) as error:
            log.warning("ticket=%s: the thread was not told: %s", ticket_id, error)

    def becomes_true(self, post_id, change):
        """Return whether a post shows a change, or a later one, in time."""
        ends, pause = time.monotonic() + self.shown_within, self.first_look
        while time.monotonic() + pause < ends:
            time.sleep(pause)
            pause = min(2 * pause, 1)
            with contextlib.suppress(MattermostError):
                shown = self.shown(self.mattermost.get_post(post_id))
                if shown and shown.status_at >= change.status_at:
                    return True
        return False


@dataclass(slots=True)
class Dialog:
    """A dialog, and the one ticket that comes of it, however often it is submitted.

    | it is      | since                                        | and a submission           |
    |------------|----------------------------------------------|----------------------------|
    | open       | /ticket was typed                            | posts the ticket           |
    | unsure     | Mattermost may have made the ticket, or we   | looks for the ticket, and  |
    |            | have forgotten the dialog: `look_since`      | posts it if there is none  |
    | filed      | there is a ticket: `post_id`                 | posts what is new in it    |
    | confirmed  | a submission has succeeded                   | is not confirmed again     |
    """

    asked: State
    channel_id: str  # where its ticket goes
    team_id: str = ""  # where /ticket was typed, if that is known
    hook: str = ""
    look_since: int = 0  # when a ticket may have been made first, in seconds since 1970; 0: never
    lock: threading.Lock = field(default_factory=threading.Lock)
    ticket_id: str = ""
    post_id: str = ""
    posted: str = ""  # fingerprint of the answers in the ticket, or those posted after
    has_reply: bool = False
    confirmed: bool = False


class Tickets:
    """Makes one ticket of a dialog, and its thread."""

    clocks_differ = 300  # seconds, Mattermost's and ours, at most
    wait_at_stop = 10  # seconds

    def __init__(self, mattermost, channels, seal, presses, form):
        self.mattermost, self.channels, self.form = mattermost, channels, form
        self.seal, self.presses = seal, presses
        self.ids = TicketIds()

    def file(self, dialog, answers, names):
        """Make sure that there is a ticket, and that answers are in it, or in its thread."""
        if not dialog.post_id:
            self.find_or_make(dialog, answers, names)
        if dialog.posted != fingerprint(answers):
            self.post_changes(dialog, answers, names)

    def find_or_make(self, dialog, answers, names):
        """Let a dialog have the ticket that an earlier try made, or a new one."""
        nonces = self.nonces("ticket", dialog)
        made = self.mattermost.patiently(lambda: self.earlier(dialog, nonces)
                                         or self.make(dialog, answers, names, nonces))
        dialog.ticket_id, dialog.post_id = made["props"]["ticket_id"], made["id"]
        dialog.posted = fingerprint(made["props"]["ticket"].get("answers"))
        # reply_count is right if Mattermost returns a post for a pending_post_id that it knows. In
        # the list that earlier() reads, it is 0: so that looks for replies itself.
        dialog.has_reply |= bool(made.get("reply_count"))
        log.info("ticket=%s user=%s channel=%s post=%s", dialog.ticket_id, dialog.asked.user_name,
                 dialog.channel_id, dialog.post_id)

    def make(self, dialog, answers, names, nonces):
        """Return the post of a new ticket, as Mattermost has made it."""
        dialog.ticket_id = dialog.ticket_id or self.ids.next()
        post, now = self.post(dialog, answers, names, nonces[0]), int(time.time())
        try:
            made = self.channels.create_post(post, dialog.team_id)
            if not is_ticket(made, nonces):
                raise self.mattermost.odd_answer()
        except MattermostError as error:
            if error.may_have_worked:
                dialog.look_since = dialog.look_since or now
            raise
        return made

    def post(self, dialog, answers, names, nonce):
        """Return the post of a new ticket, as Mattermost gets it."""
        asked, ticket_id = dialog.asked, dialog.ticket_id
        message = ticket_message(
            ticket_id, asked.user_name, self.form.markdown(answers, names), self.form.mention,
            asked.root_id and self.mattermost.link(asked.root_id))
        # Room for each status it may get, and for the longest user name.
        longest = max(len(with_status(message, status, "x" * 64)) for status in STATUSES)
        if (excess := longest - MESSAGE_LIMIT) > 0:
            raise Sorry(TICKET_TOO_LONG.format(excess=excess))
        now = milliseconds()
        # Of these, scripts read more than we do.
        ticket = {"user_id": asked.user_id, "user_name": asked.user_name, "answers": answers,
                  "names": {one: name.name for one, name in names.items()},
                  "created_at": now, "nonce": nonce,
                  **Change(NEW, asked.user_name, now)._asdict()}
        return new_post(dialog.channel_id, message, nonce, is_ticket=True, ticket_id=ticket_id,
                        ticket=ticket, attachments=self.presses.buttons(ticket_id, ticket))

    def nonces(self, purpose, dialog):
        """Return what marks a post of a dialog, a text for each slash token; new ones get the 1st.

        Not the nonce itself: people can read it in the state, and make a post with it first.
        """
        return self.seal.signatures(purpose, dialog.asked.nonce)

    def earlier(self, dialog, nonces):
        """Return the post that an earlier try of the same dialog may have made, or None."""
        if not dialog.look_since:
            return None
        since = dialog.look_since - self.clocks_differ
        try:
            posts = self.mattermost.get_channel_posts(dialog.channel_id, since * 1000)
            me = self.mattermost.get_me()["id"]
        except MattermostError as error:
            if dialog.ticket_id and not error.may_pass:  # we have tried, and can't see the outcome
                raise Sorry(NOT_KNOWN, log=error) from error
            if isinstance(error, NotAllowed):  # a bot that may post everywhere may not read there
                return None  # most dialogs that we have forgotten were not submitted before
            raise
        by_bot = [post for post in posts if isinstance(post, dict)
                  and post.get("user_id") == me and not post.get("delete_at")]
        for post in by_bot:
            if is_ticket(post, nonces):
                dialog.has_reply = any(reply.get("root_id") == post["id"] for reply in by_bot)
                return post
        if len(posts) >= POSTS:  # there may be more, and the ticket among them
            raise Sorry(NOT_KNOWN)
        return None

    def post_changes(self, dialog, answers, names):
        """Post answers that are not in the ticket in its thread.

        That is so if an earlier attempt made the ticket, its answer was lost, and the form was
        changed before it was submitted again.
        """
        posted, changed = fingerprint(answers), CHANGED.format(user_name=dialog.asked.user_name)
        message = f"{changed}\n{self.form.markdown(answers, names)}".rstrip("\n")
        self.channels.reply(dialog.channel_id, dialog.post_id, message,
                            self.nonces(f"changed {posted}", dialog)[0])
        dialog.posted = posted

    def why_not_filed(self, error, dialog):
        """Return the sentence for somebody whose ticket Mattermost did not take."""
        if dialog.post_id:
            return sentence_for(error, NOT_REACHED, NOT_ADDED.format(ticket_id=dialog.ticket_id))
        if error.meaning == "archived":
            return CANT_POST["archived"][self.channels.key("submission")]
        if error.meaning == "too long" or error.status == 413:
            return TOO_LONG_THERE
        return sentence_for(error, NOT_REACHED,
                            REJECTED.format(reason=error.words) if error.words else NOT_ACCEPTED)

    def begin_thread(self, dialog):
        """Reply to a ticket: from then on, its reporter follows the thread."""
        if dialog.has_reply:
            return
        try:
            self.channels.reply(dialog.channel_id, dialog.post_id, REPLY,
                                self.nonces("reply", dialog)[0])
        except (Sorry, MattermostError) as error:
            log.warning("ticket=%s has no reply: %s", dialog.ticket_id, error)

    def close(self):
        """Let the clock pass the last ticket ID, so that the next start can't give it again."""
        ahead = self.ids.ahead()
        if ahead > self.wait_at_stop:
            log.warning("start again in %d s at the earliest: until then, ticket IDs could repeat",
                        int(ahead) + 1)
        time.sleep(min(ahead, self.wait_at_stop))


class Directory:
    """What people and channels are called, and who is in a channel."""

    def __init__(self, mattermost):
        self.mattermost = mattermost

    def names(self, answered, channel_id):
        """Return a Name for each ID in the answers, and what is wrong with them, by element name.

        `answered` is Form.answered(); `channel_id` says where the ticket goes.
        """
        names: dict = {}
        errors = {}
        find = functools.cache(self.find)  # so that each is asked for once
        for element, answer in answered:
            if not (ids := element.ids(answer)):
                continue
            is_channel = element.data_source == "channels"
            team_id = find("channels", channel_id).get("team_id") if is_channel else ""
            for one in ids:
                name = element.name_of(find(element.data_source, one), team_id)
                if not name:
                    bot = matching(USER_NAME, self.mattermost.get_me().get("username"))
                    errors[element.name] = element.not_seen.format(bot=bot)
                    break
                names[one] = name
        return names, errors

    def find(self, data_source, one):
        """Return what an ID stands for, a JSON object; an empty one if the bot can't see it."""
        get = {"users": self.mattermost.get_user, "channels": self.mattermost.get_channel}
        with contextlib.suppress(NotAllowed):
            return get[data_source](one)
        return {}

    def outside(self, channel_id, user_ids):
        """Return which of some users are not in a channel, as far as the bot can see that."""
        found = []
        with contextlib.suppress(MattermostError):
            for user_id in user_ids:
                try:
                    self.mattermost.get_channel_member(channel_id, user_id)
                except NotAllowed as error:
                    if error.meaning != "no member":
                        raise
                    found.append(user_id)
        return found


class Desk:
    """What happens to a ticket, in order: from the command to the dialog, and from there on."""

    def __init__(self, settings):
        self.settings, self.form = settings, settings.form
        self.mattermost = Mattermost(settings)
        self.channels = Channels(self.mattermost, settings.ticket_channel)
        self.seal = Seal(settings.slash_tokens)
        self.presses = Presses(self.mattermost, self.seal, self.channels,
                               settings.callback_url + "/ticket/action")
        self.tickets = Tickets(
            self.mattermost, self.channels, self.seal, self.presses, self.form)
        self.directory = Directory(self.mattermost)
        self.dialogs = Recent()
        self.logged = set()

    def log_once(self, sentence):
        """Log that something works which could not be checked from here."""
        if sentence not in self.logged:
            self.logged.add(sentence)
            log.info(sentence)

    def on_slash_command(self, command):
        """Open the form; yield the answer to the command."""
        self.log_once("SLASH_TOKEN fits: a /ticket has come")
        channel_id = self.channels.target(command.channel_id)
        self.channels.ensure(channel_id, "command", command.team_id)
        asked = State(command.user_id, command.user_name, command.channel_id, command.root_id,
                      int(time.time()), self.form.fingerprint, secrets.token_urlsafe(24))
        self.dialogs.remember(asked.nonce, Dialog(
            asked, channel_id, command.team_id, command.hook))
        dialog, complete = self.form.prefilled(command.text)
        dialog = {**dialog, "state": self.seal.sign("state", *asked)}
        try:
            self.mattermost.open_dialog(
                command.trigger_id, self.settings.callback_url + "/ticket/submit", dialog)
        except MattermostError as error:
            sentence = FORM_LATE if error.meaning == "too late" else sentence_for(
                error, FORM_NOT_OPENED, FORM_REFUSED)
            raise Sorry(sentence, log=error) from error
        yield {} if complete else given_back(FORM_TOO_SMALL, command.text)

    def on_submission(self, submission):
        """File a ticket; yield the answer to the dialog, then confirm it and begin its thread.

        That is also done if the answer came too late: who submits again will find the ticket.
        """
        if submission.cancelled:
            yield {}
            return
        asked = opened_state(self.seal, submission, self.form)
        self.log_once("CALLBACK_URL works: a form has come back")
        channel_id = self.channels.target(asked.channel_id)
        answers, names, errors = self.read_answers(submission, asked.time, channel_id)
        if errors:
            yield {"errors": errors}
            return
        # One that is not remembered, as it was opened before the last start, may have a ticket.
        dialog = self.dialogs.remember(
            asked.nonce, Dialog(asked, channel_id, submission.team_id, look_since=asked.time))
        with dialog.lock:
            try:
                self.tickets.file(dialog, answers, names)
            except MattermostError as error:
                raise Sorry(self.tickets.why_not_filed(error, dialog), log=error) from error
            first, dialog.confirmed = not dialog.confirmed, True
        yield {}
        if first:
            self.confirm(dialog, names)
            self.tickets.begin_thread(dialog)

    def read_answers(self, submission, opened, channel_id):
        """Return the answers in a submission, a Name for each ID in them, and what is wrong."""
        answers, errors = self.form.answers_in(submission.answers, opened)
        if errors:
            return answers, {}, errors
        answered = self.form.answered(answers)
        try:
            names, errors = self.mattermost.patiently(
                lambda: self.directory.names(answered, channel_id))
        except MattermostError as error:
            raise Sorry(sentence_for(error, NOT_REACHED, NOT_ACCEPTED), log=error) from error
        return answers, names, errors

    def confirm(self, dialog, names):
        """Tell the reporter, and nobody else, that there is a ticket, and who will not see it."""
        asked, link = dialog.asked, self.mattermost.link(dialog.post_id)
        text = "\n".join([CONFIRMATION.format(ticket_id=dialog.ticket_id, link=link),
                          *self.who_is_outside(dialog, names)])
        try:
            if dialog.hook:
                self.mattermost.answer_command(dialog.hook, ephemeral(text))
                return
            log.info("ticket=%s response hook: not known any more", dialog.ticket_id)
        except MattermostError as error:
            log.warning("ticket=%s response hook: %s", dialog.ticket_id, error)
        try:
            self.mattermost.create_ephemeral_post(asked.user_id, asked.channel_id, text)
        except MattermostError as error:
            log.warning("ticket=%s was not confirmed to user=%s: %s",
                        dialog.ticket_id, asked.user_name, error)

    def who_is_outside(self, dialog, names):
        """Yield who is not in the ticket's channel: Mattermost will not tell them of anything.

        That can be the reporter, where all tickets go to one channel, and people who were chosen.
        """
        reporter = dialog.asked.user_id
        people = {reporter: ""} if dialog.channel_id != dialog.asked.channel_id else {}
        people |= {one: name.markdown for one, name in names.items() if name.is_person}
        outside = self.directory.outside(dialog.channel_id, people)
        if reporter in outside:
            outside.remove(reporter)
            yield YOU_ARE_OUTSIDE
        if outside:
            yield THEY_ARE_OUTSIDE.format(people=", ".join(people[one] for one in outside))

    def close(self):
        """End what is done for tickets."""
        self.tickets.close()
        self.mattermost.connections.close()


# -------------------------------------------------------------------------------- 10. The HTTP edge

HEAD_LIMIT = 16 * 1024  # bytes of request line and headers
BODY_LIMIT = 256 * 1024  # bytes; form-encoded, 16,383 characters are up to 196 KB
# Mattermost takes 300,000 bytes of its client, and writes some as six: < as \u003c. Whatever it can
# send is answered: a refusal would close the dialog.
SUBMISSION_LIMIT = 2 * 2**20  # bytes
BYTES_LIMIT = 64 * 2**20  # of all requests that are arriving, or wait for a thread
NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
HEAD = re.compile(
    rb"(?:\r\n)?(%b) (/[!-~]*) (HTTP/1\.[01])\r\n((?:%b:[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n"
    % (NAME, NAME))
BARE_LF = re.compile(rb"(?<!\r)\n")
HOST = re.compile(rb"[\w.~:\[\]-]*")  # may be empty: RFC 9112, 3.2
ONLY_ONCE = (b"host", b"content-length", b"content-type", b"authorization", b"expect")


class Route(NamedTuple):
    """What is done with the body of a request: it is read, reacted to, and answered."""

    limit: int  # bytes of the body
    read: Callable  # (body, settings) -> what Mattermost says; may raise Refused
    react: Callable  # (desk, what Mattermost says) yields the answer, then does what is left
    late: str  # the sentence for a person for whom that takes too long
    sorry: Callable  # (sentence, what Mattermost says or None) -> the answer that holds a sentence
    gives_back: bool = False  # whether that answer holds what the person typed, too


HEALTH = "/health"
ROUTES = {
    "/ticket": Route(
        BODY_LIMIT, SlashCommand.from_body, Desk.on_slash_command, FORM_NOT_OPENED,
        lambda sentence, command: given_back(sentence, command.text if command else ""),
        gives_back=True),
    "/ticket/submit": Route(  # the dialog stays open, and says it
        SUBMISSION_LIMIT, Submission.from_body, Desk.on_submission, NOT_REACHED,
        lambda sentence, _: {"error": sentence}),
    "/ticket/action": Route(
        BODY_LIMIT, Press.from_body, lambda desk, press: desk.presses.on_press(press), PRESS_AGAIN,
        lambda sentence, _: {"ephemeral_text": sentence}),
}


class Head(NamedTuple):
    """Request line and headers of a request."""

    method: str
    path: str  # without the query
    modern: bool  # HTTP/1.1, not 1.0
    headers: dict  # names in lower case; all is bytes
    size: int  # bytes


def read_head(received):
    """Return the head that begins these bytes, or None if more of it is to come; or refuse it.

    Strictly: what can be read in two ways is refused, since a proxy in front of us may have read it
    the other way. http.server's own parser is lenient, and most of its cost.
    """
    end = received.find(b"\r\n\r\n", 2)  # RFC 9112, 2.2: one empty line may come first
    head = bytes(received[:end + 4] if end >= 0 else received[:HEAD_LIMIT + 1])
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
    return Head(method.decode(), path, version == b"HTTP/1.1", headers, len(head))


def body_length(head):
    """Return how long the body of a request is; refuse a request that its head shows to be no good.

    Too much is refused before it is read, and so is what nobody would answer.
    """
    method, path, modern, headers, _ = head
    if b"transfer-encoding" in headers:
        raise Refused(501, "Transfer-Encoding is not supported")
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise Refused(417, "Expect is not supported, but for 100-continue")
    if (modern and b"host" not in headers) or not HOST.fullmatch(headers.get(b"host", b"")):
        raise Refused(400, "Host is missing or malformed")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit():
        raise Refused(400, "Content-Length is malformed")
    if path not in ROUTES and path != HEALTH:
        raise Refused(404, "there is nothing at this path")
    allowed = "GET, HEAD" if path == HEALTH else "POST"
    if method not in allowed.split(", "):
        raise Refused(405, f"the method must be {allowed.replace(',', ' or')}", f"Allow: {allowed}")
    if method == "POST" and b"content-length" not in headers:
        raise Refused(411, "Content-Length is missing")
    limit = BODY_LIMIT if path == HEALTH else ROUTES[path].limit
    if len(length) > 9 or int(length) > limit:
        raise Refused(413, f"the body is longer than {limit} bytes")
    return int(length)


@dataclass(slots=True, eq=False)
class Request:
    """The only request of a connection."""

    socket: socket.socket
    address: str  # of the client
    accepted: float  # when, by time.monotonic()
    due: float  # when it must be here, or answered, or (if it is refused) over
    received: bytearray = field(default_factory=bytearray)
    head: Head | None = None
    begins: int = 0  # where the body does, in what is received
    ends: int = 0
    refused: Refused | None = None  # what is still sent is dropped
    said: object = None  # what Mattermost says with it, once a Handler or a LateHandler has read it

    def is_complete(self):
        """Return whether the request is all here, or refused, as soon as something is wrong."""
        try:
            if not self.head:
                self.head = head = read_head(self.received)
                if not head:
                    return False
                self.begins, self.ends = head.size, head.size + body_length(head)
                if head.modern and b"expect" in head.headers and len(self.received) == head.size:
                    self.socket.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)
            return len(self.received) >= self.ends
        except Refused as refused:
            self.refused = refused
            return True


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives one answer to one request that is all here, or that is refused, and closes.

    So no request can hide behind another, no thread waits for one to arrive, and Mattermost loses
    no POST on a connection that is just being closed.
    """

    server: "Server"
    timeout = 10  # seconds for the answer, if the client does not read it
    note = ""  # what the log has still to say

    def setup(self):
        """Take the request from memory: self.request is a Request, and no socket."""
        head = self.request.head
        self.command, self.path = (head.method, head.path) if head else ("", "")

    def handle(self):
        """Answer the request."""
        try:
            if self.request.refused:
                raise self.request.refused
            if self.path == HEALTH:
                self.answer(200, {"status": "ok"})
            else:
                self.answer_person(ROUTES[self.path])
        except Refused as refused:
            self.note = refused.log
            self.answer(refused.status, {"error": str(refused)}, *refused.headers)

    def finish(self):
        """Do nothing: each answer has been sent at once."""

    def answer_person(self, route):
        """Answer a person with 200, whatever happens, and do what is to be done after that.

        For anything else, Mattermost would throw the form away, and what was typed with it.
        """
        request, reaction = self.request, None
        try:
            request.said = request.said or self.read(route)
            reaction = self.react(route, request.said)
            answer = next(reaction)
        except Refused:
            raise
        except Sorry as problem:
            self.note = problem.log
            answer = route.sorry(str(problem), request.said)
        except Exception:  # a bug of ours must not cost anybody their text
            log.exception("POST %s failed", self.path)
            answer = route.sorry(OUR_FAULT, request.said)
        answered = self.answer(200, answer)
        if reaction and self.note:
            log.warning("POST %s, after a late answer: %s", self.path, self.note)
        if reaction:
            with contextlib.suppress(StopIteration):  # so it ends, or has ended by being Sorry
                reaction.send(answered)

    def read(self, route):
        """Return what Mattermost says."""
        body = bytes(self.request.received[self.request.begins:self.request.ends])
        return route.read(body, self.server.desk.settings)

    def react(self, route, said):
        """Return what yields the answer, and then does what is to be done after it."""
        return route.react(self.server.desk, said)

    def answer(self, status, payload, *headers):
        """Send an answer and close; return whether it went out: not if another handler was first.

        In one write: Mattermost 9.4 to 9.7 loses a body that comes later.
        """
        body = json_bytes(payload)
        head = "\r\n".join((
            f"HTTP/1.1 {status} {self.responses[status][0]}", f"Date: {self.date_time_string()}",
            "Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close",
            *headers, "", ""))
        if not self.server.unanswered.pop(self.request, None):  # in one step, so one is the first
            return False
        self.request.received.clear()
        sent = False
        with contextlib.suppress(OSError):  # the client is gone
            self.send(head.encode() + (b"" if self.command == "HEAD" else body))
            sent = True
        self.log_request(status)
        self.server.end(self.request)
        return sent

    def send(self, answer):
        """Send an answer, and wait until the client has taken it."""
        self.request.socket.settimeout(self.timeout)
        self.request.socket.sendall(answer)

    def log_request(self, code="-", size="-"):
        """Log a line for each answer, but for good health checks; never a query or a body."""
        if code == 200 and self.path == HEALTH:
            return
        level = logging.WARNING if self.note or code != 200 else logging.INFO
        what = f"{self.command[:20]} {self.path[:200]!r}" if self.command else "no HTTP"
        log.log(level, "%s", f"{self.client_address} {what} {code} {self.note}".rstrip())
        self.note = ""  # it is said


class LateHandler(Handler):
    """Answers a person whose request is due, or has to give way: in Server's loop, so at once."""

    def read(self, route):
        """Read what will be given back: the loop has no time for more."""
        return super().read(route) if route.gives_back else None

    def react(self, route, said):
        """Be sorry."""
        seconds = time.monotonic() - self.request.accepted
        raise Sorry(route.late, log=f"there was no answer within {seconds:.0f} s")

    def send(self, answer):
        """Leave an answer to the system, which has room for 200 KB at least."""
        self.request.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(answer))
        self.request.socket.send(answer, socket.MSG_DONTWAIT)


class Arrivals(dict):
    """Requests that are not whole, or refused and still being sent: keys, the oldest first."""

    def __init__(self):
        super().__init__()
        self.selector = selectors.DefaultSelector()

    def watch(self, request):
        """Wait for more of a request."""
        if request not in self:
            self.selector.register(request.socket, selectors.EVENT_READ, request)
            self[request] = True

    def forget(self, request):
        """Wait no longer for a request."""
        if self.pop(request, None):
            self.selector.unregister(request.socket)


class Listener(http.server.ThreadingHTTPServer):
    """Listens on an address, or on all of IPv4 and IPv6."""

    request_queue_size = 1024

    def __init__(self, address, port, handler):
        both = socket.has_dualstack_ipv6() and not address
        self.address_family = socket.AF_INET6 if both or ":" in address else socket.AF_INET
        super().__init__((address, port), handler)

    def server_bind(self):
        """Bind without HTTPServer's look-up of a name: that can take 10 s."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.server_address[1]
        self.socket.setblocking(False)  # so accept() never waits


class Server(Listener):
    """ThreadingHTTPServer, with a thread only for a request that is all here, and with one clock.

    One loop, serve_forever(), owns every connection until its request is whole. It takes what has
    arrived, judges the head as soon as it is there, and answers health checks and refusals itself:
    a short answer to a new connection can't block. A whole request waits for a free thread, which
    waits for Mattermost, and for other requests about the same ticket.

    `unanswered` has each whole or refused request. Whoever takes it out, in one step, answers it:
    its thread or, when it is due, the loop. So a person gets one answer, in time, and nothing below
    has to count that time. Requests are bounded in number, time and memory; nothing that a client
    or Mattermost does can end the loop.
    """

    arrive_within = 10  # seconds in which a request has to arrive
    answer_within = 24  # seconds, those included, to its answer: Mattermost gives up after 30
    look_every = 0.05  # seconds, for what is due
    grace = 0.1  # seconds in which no connection gives way: an honest client has sent all by then
    linger = 2  # seconds for which a refused client may go on sending
    stop_within = 1  # second, in which requests that are on their way have to be here
    follow_up_within = 20  # seconds after the last answer, at a stop

    def __init__(self, desk, address, port, files=1024, threads=128):
        """Listen; `files` is how many may be open, `threads` how many requests are worked on."""
        self.desk = desk
        self.most_requests, self.most_threads = min(4096, files // 3), min(threads, files // 4)
        self.threads = ThreadPoolExecutor(self.most_threads)  # each may call Mattermost
        self.free_threads = threading.Semaphore(self.most_threads)
        self.arrivals = Arrivals()
        self.unanswered = {}  # requests: keys
        self.waiting = {}  # of these, the ones that no thread has taken: keys, the oldest first
        self.next_look = 0.0
        self.stopping, self.stopped = threading.Event(), threading.Event()
        super().__init__(address, port, Handler)

    def serve_forever(self, poll_interval=0.1):
        """Serve until shutdown(): the stock loop looks at the listening socket only."""
        self.arrivals.selector.register(self.socket, selectors.EVENT_READ)
        while not self.stopping.is_set():
            self.serve(poll_interval)
        ends = time.monotonic() + self.answer_within + self.follow_up_within
        self.arrivals.selector.unregister(self.socket)
        for _ in range(self.request_queue_size):  # whom the kernel has taken already
            if not self.accept():
                break
        self.socket.close()
        for request in self.arrivals:
            request.due = min(request.due, time.monotonic() + self.stop_within)
        while self.arrivals or self.unanswered:
            self.serve(0.02)  # seconds
        for _ in range(self.most_threads):  # not for ever: one may wait for a name server
            self.free_threads.acquire(timeout=max(0, ends - time.monotonic()))
        self.threads.shutdown(wait=False)
        self.arrivals.selector.close()
        self.stopped.set()

    def shutdown(self):
        """Stop accepting; return when all that was accepted is done, or `follow_up_within` over."""
        self.stopping.set()
        self.stopped.wait()

    def serve(self, seconds):
        """Deal with all that arrives within some seconds, and with all that is due."""
        # A thread does not tell when it is free: so this looks, while requests wait for one.
        for key, _ in self.arrivals.selector.select(0.01 if self.waiting else seconds):
            if key.fileobj is self.socket:
                self.accept()
            else:
                self.receive(key.data)
        self.begin()
        if (now := time.monotonic()) > self.next_look:
            self.look(now)

    def look(self, now):
        """End what has taken too long, or takes too much memory."""
        self.next_look = now + self.look_every
        requests = [*self.arrivals, *list(self.unanswered)]  # list() is one step: threads pop, too
        for request in [one for one in requests if one.due < now]:
            self.give_up(request)
            if time.monotonic() > self.next_look:  # the rest at the next look: others wait, too
                break
        ends = time.monotonic() + self.look_every
        excess = sum(len(one.received) for one in (*self.arrivals, *self.waiting)) - BYTES_LIMIT
        while excess > 0 and time.monotonic() < ends and (
                oldest := self.oldest(lambda one: one.received)):
            excess -= len(oldest.received)
            self.give_up(oldest)

    def accept(self):
        """Accept a connection and take what it has sent already; return whether there may be more.

        Where there are too many, the oldest gives way, once it has had its time.
        """
        now = time.monotonic()
        if len(self.arrivals) + len(self.unanswered) >= self.most_requests:
            oldest = self.oldest()
            if not oldest or now - oldest.accepted < self.grace:
                time.sleep(0.01)  # seconds; who waits to be accepted is kept by the kernel
                return True
            self.give_up(oldest)
        try:
            connection, (address, *_) = self.get_request()
        except OSError as error:
            if not isinstance(error, BlockingIOError):  # no file is left: do not ask again at once
                time.sleep(0.05)
            return False
        self.receive(Request(
            connection, address.removeprefix("::ffff:"), now, now + self.arrive_within))
        return True

    def receive(self, request):
        """Take what has arrived of a request; whatever is wrong with it, only it can fail."""
        try:
            complete = False
            with contextlib.suppress(BlockingIOError):
                data = request.socket.recv(65536, socket.MSG_DONTWAIT)
                if not data:
                    raise ConnectionError("the client has gone")
                if not request.refused:  # else it still sends
                    request.received += data
                    complete = request.is_complete()
            if complete:
                self.take(request)
            else:
                self.arrivals.watch(request)
        except Exception as error:
            if not isinstance(error, OSError):
                self.handle_error(request, request.address)
            self.hang_up(request)

    def take(self, request):
        """Answer a health check or a request that is refused; let any other wait for a thread."""
        self.arrivals.forget(request)
        self.unanswered[request] = True
        if request.refused or request.head.path == HEALTH:
            self.answer_with(Handler, request)
            return
        request.due = request.accepted + self.answer_within
        self.waiting[request] = True

    def begin(self):
        """Let free threads work on the requests that wait."""
        while self.waiting and self.free_threads.acquire(blocking=False):
            request = next(iter(self.waiting))
            del self.waiting[request]
            with contextlib.suppress(RuntimeError):  # no thread could start, but it is queued
                self.threads.submit(self.work_on, request)

    def work_on(self, request):
        """Answer a request, in a thread."""
        try:
            if request in self.unanswered:
                self.answer_with(Handler, request)
        finally:
            self.free_threads.release()

    def answer_with(self, handler, request):
        """Let a handler answer a request; after a bug, end the connection without an answer."""
        try:
            handler(request, request.address, self)
        except Exception:
            self.handle_error(request, request.address)
            if self.unanswered.pop(request, None):
                self.close_request(request.socket)

    def oldest(self, may=lambda request: True):
        """Return the oldest request that may give way, or None if there is none."""
        found = [request for table in (self.arrivals, self.waiting)
                 for request in itertools.islice(filter(may, table), 1)]
        return min(found, key=lambda request: request.accepted, default=None)

    def give_up(self, request):
        """End a request before it is done; a person whose request is all here is told."""
        if request in self.arrivals:
            self.hang_up(request)
        elif request in self.unanswered:
            self.waiting.pop(request, None)
            self.answer_with(LateHandler, request)

    def hang_up(self, request):
        """End a connection without an answer."""
        self.arrivals.forget(request)
        self.close_request(request.socket)

    def end(self, request):
        """End an answered connection, after a refusal later: a reset could lose the answer."""
        if not request.refused:
            self.shutdown_request(request.socket)
            return
        with contextlib.suppress(OSError):  # it has been reset: recv() will say so
            request.socket.shutdown(socket.SHUT_WR)
        request.socket.setblocking(False)
        request.due = time.monotonic() + self.linger
        self.arrivals.watch(request)

    def handle_error(self, request, client_address):
        """Log a bug of ours: what clients do is no error."""
        log.exception("a request of %s failed", client_address)


# ----------------------------------------------------------------------------- 11. The command line

FILES = 16 * 1024  # that the service may open, if the system lets it
SIGNALS = {signal.SIGTERM, signal.SIGINT}  # that end the service
LEVELS = {"ok": logging.INFO, "note": logging.INFO,
          "warning": logging.WARNING, "problem": logging.ERROR}


def address_of(host, port):
    """Return the URL at which a service that listens on a host and a port can be asked."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def health_fault(url, tls=None):
    """Return why a URL is not that of a service that is well; "" if it is."""
    parts = urllib.parse.urlsplit(url + "/health")
    try:
        secure = {"context": tls or tls_context("")} if parts.scheme == "https" else {}
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=5, **secure)
        with contextlib.closing(connection):
            connection.request("GET", parts.path, headers={"User-Agent": USER_AGENT})
            answer = connection.getresponse()
            well = answer.status == 200 and answer.read(100) == json_bytes({"status": "ok"})
            if well:
                return ""
            target = redirected_to(answer, url + "/health")
            leads = f", and leads to {target}" if target else ""
            return f"another program answers ({answer.status}){leads}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return repr(error)


def callback_checks(settings, port):
    """Yield whether CALLBACK_URL can be right; a wrong one costs people their text."""
    url = settings.callback_url
    parts = urllib.parse.urlsplit(url)
    if is_loopback(url) and not is_loopback(settings.mattermost_url):
        yield "warning", f"CALLBACK_URL: {url} is Mattermost's own machine"
    if parts.port and parts.port not in (port, 80, 443):
        yield "warning", f"CALLBACK_URL: its port is {parts.port}, but PORT is {port}"
    if health_fault(address_of(settings.listen_address, port)):
        yield "note", "CALLBACK_URL: it can't be checked while the service does not run"
    elif wrong := health_fault(url, settings.tls):
        yield "warning", ("CALLBACK_URL: Mattermost must reach it; from here it does not answer: "
                          f"{url}: {one_line(wrong)}")
    else:
        yield "ok", "CALLBACK_URL: the service answers there, as seen from here"


def mattermost_checks(desk):
    """Yield whether Mattermost answers, which one it is, and whether the bot is one."""
    try:
        config = desk.mattermost.get_client_config()
    except MattermostError as error:
        yield "problem", f"MATTERMOST_URL: {error}"
        return
    version, site_url = config["Version"], str(config.get("SiteURL"))
    yield "ok", f"MATTERMOST_URL: Mattermost {version} answers"
    numbers = tuple(int(part) for part in re.findall(r"\d{1,4}", version)[:2])
    if numbers < (9, 4):
        yield "warning", "MATTERMOST_URL: before 9.4, a form has 3 seconds to open: update it"
    yield from ((level, f"{desk.form.source}: {what}") for level, what in desk.form.needs(numbers))
    if config.get("CollapsedThreads") in ("disabled", "default_off"):
        yield "note", ("MATTERMOST_URL: Collapsed Reply Threads are "
                       f"{config['CollapsedThreads']}: people who follow a ticket are not told of "
                       "replies")
    if site_url.startswith("http"):
        yield "ok", f"MATTERMOST_URL: its SiteURL, for links to tickets, is {site_url}"
    else:
        yield "warning", "MATTERMOST_URL: it has no SiteURL: set it, for the links to tickets"
    yield from bot_checks(desk)


def bot_checks(desk):
    """Yield whose token it is, and whether the bot may post."""
    try:
        me = desk.mattermost.get_me()
        bot = me.get("username")
        if not me.get("is_bot"):
            yield "problem", (f"BOT_TOKEN: @{bot} is a person, and would be the author of all "
                              "tickets: use the token of a bot account")
        teams = [str(team.get("name")) for team in desk.mattermost.get_my_teams()]
    except MattermostError as error:
        hint = " (a Token ID is not a token)" if error.status == 401 else ""
        yield "problem", (f"BOT_TOKEN: {error}{hint}" if error.by_mattermost
                          else f"MATTERMOST_URL: {error}")
        return
    if teams:
        yield "ok", f"BOT_TOKEN: it is that of @{bot}, in the team {', '.join(teams)}"
    else:
        yield "problem", (f"BOT_TOKEN: @{bot} is in no team: somebody in a team has to add it "
                          "(team name ▾ › Invite people)")
    if desk.settings.ticket_channel:
        yield from ticket_channel_checks(desk, me)


def ticket_channel_checks(desk, me):
    """Yield whether the bot may post in the ticket channel, and who can read it."""
    bot = me.get("username")
    channel_id = desk.settings.ticket_channel
    try:
        if obstacle := desk.channels.obstacle(channel_id, me):
            yield "problem", (f"TICKET_CHANNEL: {channel_id}: "
                              f"{CANT_POST[obstacle]['admin'].format(bot=bot)}")
            return
        yield "ok", f"TICKET_CHANNEL: @{bot} can post there"
        channel = {}
        with contextlib.suppress(NotAllowed):  # who may post everywhere may not look everywhere
            channel = desk.mattermost.get_channel(channel_id)
        if channel.get("type") in ("P", "G"):
            yield "warning", ("TICKET_CHANNEL: it is private: people who are not in it can't read "
                              "their tickets, and are not told of replies")
        else:
            yield "note", ("TICKET_CHANNEL: who is not in it is not told of replies to a ticket: "
                           "people have to join it")
    except MattermostError as error:
        yield "warning", f"TICKET_CHANNEL: it can't be looked at: {error}"


def checks(desk, port):
    """Yield one of LEVELS and a sentence, beginning with a setting, for all there is to know."""
    yield from (("note", f"{desk.form.source}: {note}") for note in desk.form.notes)
    yield from callback_checks(desk.settings, port)
    yield "note", "SLASH_TOKEN: it can't be checked from here: type /ticket"
    for level, sentence in mattermost_checks(desk):
        yield level, one_line(sentence)


def log_checks(desk, port):
    """Log what the admin should know; a Mattermost that is down is no reason to stop."""
    for level, sentence in checks(desk, port):
        log.log(LEVELS[level], "%s", sentence)


def print_checks(settings):
    """Print what is fine and what is not; return the exit status."""
    desk, levels, encoding = Desk(settings), set(), sys.stdout.encoding or "utf-8"
    for level, sentence in checks(desk, settings.port):
        levels.add(level)
        line = f"{level:8}{sentence}".encode(encoding, "backslashreplace")
        print(line.decode(encoding), flush=True)
    desk.close()
    return 1 if "problem" in levels else 0


def health(environ):
    """Ask the service that runs on this machine whether it is well; return the exit status."""
    try:
        url = address_of(read_setting(environ, "LISTEN_ADDRESS"), read_setting(environ, "PORT"))
    except ValueError as error:
        print(f"LISTEN_ADDRESS or PORT {error}", file=sys.stderr)
        return 1
    if wrong := health_fault(url):
        print(f"no answer at {url}: {wrong}", file=sys.stderr)
        return 1
    return 0


def file_limit():
    """Set the soft limit of open files to what we may need, up (it is often 1,024) or down."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    with contextlib.suppress(OSError, ValueError):  # macOS has a limit that it does not tell
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft if soft > 0 else FILES


def keep_serving(server):
    """Run a server's loop; if a bug ends it, end the process, which could serve nobody any more."""
    try:
        server.serve_forever()
    finally:
        server.stopped.set()
        # For sigwait() in serve(). After a shutdown() nobody waits for it, and it stays blocked.
        os.kill(os.getpid(), signal.SIGTERM)


def serve(settings):
    """Run the service until SIGTERM or SIGINT; return the exit status."""
    desk = Desk(settings)
    try:
        server = Server(desk, settings.listen_address, settings.port, file_limit())
    except OSError as error:
        log.error("LISTEN_ADDRESS and PORT: %s:%d can't be opened: %s",
                  settings.listen_address, settings.port, error)
        return 1
    threading.Thread(target=keep_serving, args=(server,)).start()
    log.info("listening on port %d", server.server_port)
    threading.Thread(target=log_checks, args=(desk, server.server_port), daemon=True).start()
    signal.sigwait(SIGNALS)
    failed = server.stopped.is_set()
    log.info("stopping")
    server.shutdown()
    desk.close()
    return 1 if failed else 0


def main(arguments, environ):
    """Do what the command line says; return the exit status."""
    variables = "\n".join(f"  {name:16}{setting.meaning}" for name, setting in SETTINGS.items())
    in_file = ", ".join(name for name, setting in SETTINGS.items() if setting.in_file)
    parser = argparse.ArgumentParser(
        description="A /ticket slash command for Mattermost. Without an option: run the service.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"environment variables:\n{variables}\n\n"
               f"A file can hold {in_file}:\nname it in BOT_TOKEN_FILE and so on.")
    options = parser.add_mutually_exclusive_group()
    options.add_argument("--check", action="store_true", help="check settings and Mattermost")
    options.add_argument("--health", action="store_true", help="ask the running service")
    chosen = parser.parse_args(arguments)
    if chosen.health:
        return health(environ)
    if not chosen.check:
        # Early, so that sigwait() in serve() gets them: as PID 1, nothing else would end us.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        settings = Settings.from_environment(environ)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    if chosen.check:
        return print_checks(settings)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    return serve(settings)


def end(status):
    """End the process, though a thread may wait for a name server: sys.exit() would wait, too."""
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    end(main(sys.argv[1:], os.environ))
