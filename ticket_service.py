#!/usr/bin/env python3
"""A `/ticket` slash command for Mattermost, in one file that needs nothing but Python.

The life of a ticket:

1. Somebody types `/ticket`, and Mattermost calls `POST /ticket`. We make sure that the bot can post
   in the channel, and open a dialog whose signed `state` says who asked, where and when.
2. The person fills in the dialog, and Mattermost calls `POST /ticket/submit`. We check the state
   and the answers. Whatever is wrong, the dialog stays open and says so: no text is ever lost.
3. The ticket is posted in the channel, once, however often the dialog is submitted.
4. After the response, the person gets an ephemeral confirmation with the ticket's ID, and the bot
   replies in the thread, which makes the reporter follow it.
5. Buttons in the post take, hand over, close and reopen the ticket: Mattermost calls
   `POST /ticket/action`. The bot changes its own post, and tells the thread what has happened.
6. The button Edit opens the form again; submitted, it changes the ticket in the same way.

All that is known of a ticket is in its post. To change the form, edit FORM or name a file in
FORM_FILE. What a ticket can be is in STATUSES, what people read stands below it, how a ticket looks
is in new_ticket() and Ticket. `--help` lists the settings; the rest is in README.md.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # whatever stands below would fail with a traceback
    print(f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)
try:
    import resource
except ImportError:
    print("Linux or another POSIX system is needed: on Windows, use a container", file=sys.stderr)
    sys.exit(2)

import argparse
import base64
import calendar
import collections
import contextlib
import csv
import datetime
import functools
import getpass
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import os
import re
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
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, NoReturn, TypeVar

T = TypeVar("T")
Json = dict[str, Any]  # a JSON object
log = logging.getLogger("ticket")


# ------------------------------------------------------- 1. The form, and the sentences people read
#
# What an admin may want to change or translate: the rest of the file follows it.

# Mattermost's own dialog object, as it goes over the wire:
# https://developers.mattermost.com/integrate/plugins/interactive-dialogs/
# One entry is the field in the dialog, the rule its answer is checked by, and what a ticket shows.
# Keys of ours, which Mattermost does not get:
# - "mention": "@team-or-user" in an option is written into the tickets for which it was chosen;
# - "mention" in the form itself is written into every ticket;
# - "channel": "ID" in an option sends the tickets for which it was chosen to that channel;
# - "subject": True in a text or textarea: its first line is a ticket's heading; if no element has
#   it, the first line of the first textarea that was filled in is;
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
        },
        {
            "display_name": "Network information", "name": "network", "type": "textarea",
            "optional": True, "help_text": "IP addresses, ports", "code": True,
        },
    ],
}


class Status(NamedTuple):
    """A status of a ticket: how the ticket shows it, and what can be pressed then."""

    mark: str  # begins the ticket's heading
    tag: str  # what people search for
    line: str  # how the ticket's second line ends; holds the tag
    color: str  # of the bar beside the buttons
    # Buttons and menus, and their labels. A key of STATUSES gives the ticket that status ("taken"
    # in "taken": somebody else takes over); HAND_OVER is a menu of people; EDIT opens the form.
    steps: dict[str, str]
    reply: str  # in the thread, when a step has led here
    already: str  # for somebody who pressed too late


HAND_OVER, EDIT = "handover", "edit"
STATUSES = {  # the first is that of a new ticket
    "open": Status(
        mark="🔵",
        tag="#ticket-open",
        line="#ticket-open",
        color="#1C58D9",
        steps={"taken": "Take", "closed": "Close", EDIT: "Edit", HAND_OVER: "Hand over to…"},
        reply="{by} reopened this ticket.",
        already="This ticket is already reopened by @{status_by}."),
    "taken": Status(
        mark="🟡",
        tag="#ticket-taken",
        line="#ticket-taken by @{status_by}",
        color="#FFBC1F",
        steps={"taken": "Take over", "closed": "Close", EDIT: "Edit", HAND_OVER: "Hand over to…"},
        reply="{taker} takes care of this ticket.",
        already="This ticket is already taken by @{status_by}."),
    "closed": Status(
        mark="✅",
        tag="#ticket-closed",
        line="#ticket-closed by @{status_by}",
        color="#AEB4C0",
        steps={"open": "Reopen"},
        reply="{by} closed this ticket. Not solved? Press Reopen.",
        already="This ticket is already closed by @{status_by}."),
}
NEW, TAKEN, CLOSED = "open", "taken", "closed"  # the program itself gives or looks for these
# An action's ID is a status and a step, joined. If it has anything but letters and digits,
# Mattermost makes no call for it.
assert all(re.fullmatch("[A-Za-z0-9]+", key)
           for name, status in STATUSES.items() for key in (name, *status.steps))

# In a ticket. A change finds these in its post again, so who translates them keeps their shape:
# HEADING is some # and {mark} {subject}, SECOND_LINE holds #{ticket_id} and {status}, THREAD and
# FOR begin with words of their own.
HEADING = "##### {mark} {subject}"
SECOND_LINE = "#{ticket_id} · @{reporter} · {status}"
EDITED_BY = " · edited by @{user_name}"
THREAD = "**Thread:** [where it was asked]({link})"
FOR = "**For:** {mention}"
YES, NO = "yes", "no"  # of a box to tick

# In a ticket's thread, and in the one where it was asked for.
FIRST_REPLY = ("Please reply in this thread: questions, news, screenshots and the solution belong "
               "here.")
HANDED_OVER = "{taker} takes care of this ticket: {by} handed it over."
EDITED = "{by} edited this ticket."
TELL_REPORTER = "{reply} (@{reporter})"
# In the lines below EDITED. A response to a form has no room for what is said to the editor.
NO_ANSWER, LONG_ANSWER = "–", "…"  # for an answer that is gone, or long
TO_EDITOR = "@{by}: {sentence}"
SUBMITTED_AGAIN = "{by} submitted the form again, with other answers:"
ASKED_HERE = "A ticket: [#{ticket_id}]({link})"
REMINDER = "Nothing has happened here since {day}. Is this ticket still open?"
REMINDER_TO = "{who}: nothing has happened here since {day}. Is this ticket still open?"

# For one person.
CONFIRMATION = "Your ticket has been created: [#{ticket_id}]({link})"
YOU_ARE_OUTSIDE = ("You are not in the ticket's channel: you will not be told of replies until you "
                   "join, or are let in.")
THEY_ARE_OUTSIDE = ("Not in the ticket's channel, so they will not be told of it until they join: "
                    "{people}.")


class CantPost(NamedTuple):
    """Why the bot can't post in a channel, for two readers.

    Mattermost shows our responses under the person's own name: so no "I".
    """

    person: str  # after /ticket, a submission or a press
    admin: str  # in --check, and in the log


CANT_POST = {
    "not a member": CantPost(
        "@{bot} can't post in this channel yet: type `/invite @{bot}` there, then try again.",
        "@{bot} is not a member: type `/invite @{bot}` in that channel (if it is not in the team, "
        "somebody in it has to add it first: team name ▾ › Invite people)"),
    "archived": CantPost(
        "This channel is archived. Copy your text, and use `/ticket` in another one.",
        "the channel is archived: unarchive it, or set another one"),
    "not in the team": CantPost(
        "@{bot} is not in this team yet: add it (team name ▾ › Invite people), then try again.",
        "@{bot} is not in the team: somebody in it has to add it (team name ▾ › Invite people)"),
    "unknown": CantPost(
        "Mattermost does not find this channel. Please tell your Mattermost admin.",
        "there is no such channel: its ID is in the channel's menu, under View Info"),
    "direct": CantPost(
        "@{bot} makes no tickets in direct messages. Copy your text, and use `/ticket` in a "
        "channel.",
        "it is a direct or group message: set the ID of a channel"),
    "read only": CantPost(
        "@{bot} may not post in this channel: its admin has to let members, or @{bot}, post.",
        "@{bot} is a member, but may not post: let members, or @{bot}, create posts"),
}
CANT_POST_ELSEWHERE = "@{bot} can't post in the ticket's channel. Please tell your admin."

# Instead of a form; FORM_TOO_SMALL when one has opened, but could not take all of the text.
FORM_LATE = "The form came too late for Mattermost. Please try again."
FORM_NOT_OPENED = "Mattermost does not answer. If no form opens, please try again in a moment."
FORM_REFUSED = "Mattermost refused to open the form. Please tell your Mattermost admin."
FORM_TOO_SMALL = "The form has no room for all that you typed."
WHAT_YOU_TYPED = "What you typed:"

# Instead of a form, above its buttons, or after a press.
BAD_TOKEN = "Mattermost does not accept the bot's token. Please tell your Mattermost admin."
IN_BETWEEN = ("Something between the ticket service and Mattermost refused it ({status}). "
              "Please tell your admin.")
IN_PLACE = ("Something between the ticket service and Mattermost answered in its place. Please "
            "tell your admin.")
NOT_SECURE = "The ticket service can't reach Mattermost securely. Please tell your admin."
OUR_FAULT = "Something went wrong in the ticket service. Please try again, or tell your admin."

# In a form, above its buttons.
FORM_INVALID = "This form is no longer valid. Copy your text, open the form again and paste it."
NOT_REACHED = "Mattermost does not answer. Submit again in a moment: nothing is done twice."
NOT_ACCEPTED = "Mattermost did not accept the ticket. Please change it, or tell your admin."
REJECTED = "Mattermost did not accept the ticket. Please change it, or tell your admin: {reason}"
NOT_KNOWN = "Your ticket may be there: look for it. If it is not, copy your text to a new /ticket."
NOT_KNOWN_BY_ID = ("Your ticket may be there: search for #{ticket_id}. If it is not, copy your "
                   "text to a new /ticket.")
NOT_ADDED = "#{ticket_id} is there, but your changes are not. Please put them into its thread."
DAY_FULL = "All ticket IDs of today are used up. Please submit again after midnight UTC."
TICKET_TOO_LONG = "The ticket is {excess} characters too long. Please shorten it and submit again."
TOO_LONG_THERE = "The ticket is too long for this Mattermost. Please shorten it and submit again."
EDITED_MEANWHILE = ("#{ticket_id} has been edited since you opened this form. Copy your text, and "
                    "press Edit there.")
SAVE = "Save"  # the label below a form to edit a ticket
NO_EDITS = ("Mattermost does not let the bot edit this ticket any more. Please put your changes "
            "into its thread.")

# After a press, or in a form to edit a ticket.
NOT_OUR_TICKET = ("This does not belong to a ticket of this service: nothing was changed. Please "
                  "tell your admin.")
UNKNOWN_STATUS = ("The ticket service does not know the status {status}: nothing was changed. "
                  "Please tell your admin.")
PRESS_AGAIN = ("Mattermost does not answer. Look at the ticket: if it has not changed, press again "
               "in a moment.")
NOT_CHANGED = "Mattermost did not change the ticket. Please tell your Mattermost admin."
TICKET_ARCHIVED = "The ticket's channel is archived; nothing was changed."
TICKET_GONE = "Mattermost does not find this ticket any more; nothing was changed."
NOT_READABLE = ("The bot can't read this channel any more: nothing was changed. Invite it, then "
                "try again.")
TOO_LONG_TO_CHANGE = ("The ticket is too long for this Mattermost to change. Please use its "
                      "thread, or shorten it.")
NOT_EDITABLE = ("The form has changed, or the ticket was edited by hand. Please put your changes "
                "into its thread.")
TOO_LONG_TO_EDIT = "This ticket is too long for a form. Please put your changes into its thread."
NOT_FOR_YOU = "Only members of the ticket's channel can edit it. Please join the channel first."
NOBODY = "There is nobody to hand this ticket over to by that choice; nothing was changed."
NOT_TO_A_BOT = "@{user_name} is a bot, and can't take care of a ticket; nothing was changed."
HAS_LEFT = "@{user_name} is deactivated, and can't take care of a ticket; nothing was changed."

# In a form, under a field.
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


# -------------------------------------------------------------------------- 2. The life of a ticket
#
# What happens when Mattermost calls, in the order of the docstring above. It promises that a person
# is told what has become of what they did, and the thread only what has really happened.

Reaction = Iterator[Json]  # yields the response; resumed after that was sent, it does the rest


class Problem(Exception):
    """Something that a person has to know: str() is the sentence they read.

    `log` is what the log says of it.
    """

    def __init__(self, sentence: str, log: object = None) -> None:
        super().__init__(sentence)
        self.log = str(log or sentence)


class FieldProblems(Problem):
    """What is wrong with the answers in a form: a sentence for each element, by its name."""

    def __init__(self, errors: dict[str, str]) -> None:
        super().__init__(" ".join(errors.values()))
        self.errors, self.log = errors, ""  # for the person only


class TicketService:
    """Reacts to what people do: on_...() yields the response, and goes on when that has been sent.

    What stands behind a yield can no longer be told to the person, only be logged. It runs even if
    the response came too late for Mattermost: what has happened, has happened.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.form = settings, settings.form
        self.mattermost = Mattermost(
            settings.mattermost_url, settings.bot_token, settings.tls)
        self.seal = Seal(settings.slash_tokens)
        self.channels = Channels(self.mattermost, settings)
        self.directory = Directory(self.mattermost)
        self.tickets, self.changes = Tickets(self), Changes(self)
        self.drafts: Recent[Draft] = Recent()  # by nonce
        self.logged: set[str] = set()

    def on_slash_command(self, command: SlashCommand) -> Reaction:
        """Open the form."""
        self.log_once("SLASH_TOKEN fits: a /ticket has come")
        with self.mattermost.retrying(self.mattermost.patience_before_form):
            if not self.form.options_give_channel:  # else it is checked when the ticket is posted
                self.channels.ensure_can_post(
                    self.channels.usual_channel(command.channel_id), asked_in=command.channel_id,
                    team_id=command.team_id)
            root_id, said = self.thread_of(command)
            asked = State(command.user_id, command.user_name, command.channel_id, root_id,
                          int(time.time()), self.form.fingerprint, secrets.token_urlsafe(24))
            self.drafts.get_or_add(asked.nonce, Draft(asked, command.team_id, command.hook))
            dialog, is_whole = self.form.prefilled(command.text or said)
            self.open_dialog(command.trigger_id, dialog, asked)
        is_lost = command.text and not is_whole
        yield given_back(FORM_TOO_SMALL, command.text) if is_lost else {}

    def thread_of(self, command: SlashCommand) -> tuple[str, str]:
        """Return a command's thread and the text of its first message; "" for what does not count.

        The ID is the client's word, and the bot reads more than the person may: it counts if it is
        that of a root post in the command's channel. What the bot says itself makes no ticket.
        """
        if not command.root_id:
            return "", ""
        try:
            post, bot_id = self.mattermost.get_post(command.root_id), self.mattermost.bot_id()
        except MattermostError as error:
            log.info("the thread of a /ticket does not count: %s", error)
            return "", ""
        if post.get("root_id") or post.get("channel_id") != command.channel_id:
            return "", ""
        said = "" if post.get("user_id") == bot_id else post.get("message")
        return command.root_id, clean(said) if isinstance(said, str) else ""

    def open_dialog(self, trigger_id: str, dialog: Json, asked: State | EditState) -> None:
        """Open a dialog by the trigger of a command or a press; raise Problem if that fails."""
        try:
            self.mattermost.open_dialog(
                trigger_id, self.settings.callback_url + "/ticket/submit",
                {**dialog, "state": self.seal.sign(PURPOSES[type(asked)], *asked)})
        except MattermostError as error:
            sentence = FORM_LATE if error.meaning == "too late" else sentence_for(
                error, FORM_NOT_OPENED, FORM_REFUSED)
            raise Problem(sentence, log=error) from error

    def on_submission(self, submission: Submission) -> Reaction:
        """Post a ticket, or edit one: whichever the dialog was opened for."""
        if submission.cancelled:
            yield {}
            return
        asked = opened_state(self.seal, submission, self.form.fingerprint)
        self.log_once("CALLBACK_URL works: a form has come back")
        if isinstance(asked, State):
            yield from self.on_new_ticket(asked, submission)
        else:
            yield from self.on_edit(asked, submission)

    def on_new_ticket(self, asked: State, submission: Submission) -> Reaction:
        """Post a ticket; then confirm it, and begin its thread."""
        values = self.form.values_in(submission.answers, opened=asked.time)
        # One that is not known was opened before our last start: it may have been submitted then.
        draft = self.drafts.get_or_add(
            asked.nonce, Draft(asked, submission.team_id, look_since=asked.time))
        with self.mattermost.retrying(), draft.lock:
            try:
                if not (draft.post_id or draft.is_unsure):  # else its channel stays (see Draft)
                    draft.channel_id = (self.form.channel_of(values)
                                        or self.channels.usual_channel(asked.channel_id))
                names = self.directory.names(self.form.answered(values), draft.channel_id)
                self.tickets.post(draft, Answers(values, names))
            except MattermostError as error:
                raise Problem(why_not_posted(error, draft), log=error) from error
            is_first, draft.is_confirmed = not draft.is_confirmed, True
        yield {}
        if is_first:
            with self.mattermost.retrying():
                self.tickets.confirm(draft, names)
                self.tickets.begin_thread(draft)

    def on_press(self, press: Press) -> Reaction:
        """Take, hand over, close or reopen a ticket, or open the form to edit it."""
        signed = self.seal.open("action", press.signed) or []
        if len(signed) != 3 or not (press.user_id and press.user_name and press.post_id):
            raise Problem(NOT_OUR_TICKET)
        ticket_id, status_at, wanted = signed  # status_at as it was when the button was made
        by = User(press.user_id, press.user_name)
        change: Change | None = None
        response: Json = {}
        with self.mattermost.retrying(), explained(PRESS_AGAIN, TOO_LONG_TO_CHANGE):
            if wanted == EDIT:
                self.open_form_to_edit(press, ticket_id)
            else:
                to = self.directory.taker(press.selected) if wanted == HAND_OVER else by
                change = self.changes.press(press.post_id, ticket_id, status_at, wanted, by, to)
                response = self.response_to_press(change, by, to)
        yield response
        self.changes.tell_thread(change)

    def response_to_press(self, change: Change, by: User, to: User) -> Json:
        """Return a response that says what the ticket itself does not show."""
        if change.failure and change.failure.may_have_worked:
            return {"ephemeral_text": why_not_changed(
                change.failure, PRESS_AGAIN, TOO_LONG_TO_CHANGE)}
        # Any other failure is a refused edit (see Change): the post can still be changed by what a
        # press's response says.
        response: Json = {"update": change.content} if change.failure else {}
        if to != by and self.directory.outside(change.ticket.channel_id, [to.id]):
            response["ephemeral_text"] = THEY_ARE_OUTSIDE.format(people=f"@{to.name}")
        return response

    def open_form_to_edit(self, press: Press, ticket_id: str) -> None:
        """Open the form with a ticket's answers, for a member of its channel."""
        ticket = self.changes.read(press.post_id, ticket_id)
        if EDIT not in STATUSES[ticket.status].steps:
            raise Problem(ticket.already())
        if not self.directory.is_member(ticket.channel_id, press.user_id):
            raise Problem(NOT_FOR_YOU)
        self.changes.refuse_stale(ticket)  # or the form would begin with old answers
        dialog = self.form.filled(ticket.answers, ticket.old_names)
        if not dialog or ticket.body_lines() is None:
            raise Problem(NOT_EDITABLE)
        if len(json_bytes(dialog)) > DIALOG_BYTES:
            raise Problem(TOO_LONG_TO_EDIT)
        self.open_dialog(press.trigger_id, {**dialog, "title": ticket_id}, EditState(
            press.user_id, press.user_name, press.post_id, ticket_id, int(time.time()),
            self.form.fingerprint, ticket.answers_print))

    def on_edit(self, asked: EditState, submission: Submission) -> Reaction:
        """Give a ticket other answers; then tell its thread."""
        with self.mattermost.retrying(), explained(NOT_REACHED, TOO_LONG_THERE):
            change = self.changes.edit(asked, submission)
        failure = change.failure if change else None
        why = why_not_changed(failure, NOT_REACHED, TOO_LONG_THERE) if failure else ""
        # A refused edit ends here: a dialog's response can't change the post, as a press's can.
        if failure and not failure.may_have_worked:
            # Mattermost itself will not let it pass later; a proxy may, if somebody is told.
            raise Problem(NO_EDITS if failure.by_mattermost else why, log=failure)
        yield {"error": why} if why else {}
        self.changes.tell_thread(change)

    def log_once(self, sentence: str) -> None:
        """Log a sentence once: it says that something works that --check can't test."""
        if sentence not in self.logged:
            self.logged.add(sentence)
            log.info(sentence)

    def close(self) -> None:
        """Wait until ticket IDs can't repeat, and close connections."""
        self.tickets.close()
        self.mattermost.connections.close()


def sentence_for(error: MattermostError, again: str, refused: str) -> str:
    """Return the sentence for a failed call, by the cases in MattermostError's table.

    `again` if it may pass, `refused` if Mattermost itself said no, a fixed one for the rest.
    """
    if error.may_pass:
        return again
    if error.status is None:  # nobody answered, and nobody will: a bad certificate, or no TLS
        return NOT_SECURE
    if error.is_foreign:  # no error of Mattermost's own: a proxy answered, or another program
        return IN_PLACE if error.status < 300 else IN_BETWEEN.format(status=error.status)
    return BAD_TOKEN if error.status == 401 else refused


def why_not_posted(error: MattermostError, draft: Draft) -> str:
    """Return the sentence for somebody whose ticket Mattermost did not take."""
    if draft.post_id:
        return sentence_for(error, NOT_REACHED, NOT_ADDED.format(ticket_id=draft.ticket_id))
    if error.is_too_long:
        return TOO_LONG_THERE
    refused = REJECTED.format(reason=error.words) if error.words else NOT_ACCEPTED
    return sentence_for(error, NOT_REACHED, refused)


def why_not_changed(error: MattermostError, again: str, too_long: str) -> str:
    """Return the sentence for a failed press or Edit."""
    if error.meaning == "archived":
        return TICKET_ARCHIVED
    if error.is_too_long:
        return too_long
    refused = {403: NOT_READABLE, 404: TICKET_GONE}.get(error.status or 0, NOT_CHANGED)
    return sentence_for(error, again, refused)


@contextlib.contextmanager
def explained(again: str, too_long: str) -> Iterator[None]:
    """Raise Problem for a MattermostError in a press or Edit."""
    try:
        yield
    except MattermostError as error:
        raise Problem(why_not_changed(error, again, too_long), log=error) from error


@dataclass(slots=True)
class Draft:
    """A dialog for a new ticket, and the ticket of it: one, however often it is submitted.

    | it is      | since                                      | and a submission                |
    |------------|--------------------------------------------|---------------------------------|
    | open       | /ticket was typed                          | posts the ticket                |
    | forgotten  | it was opened before the last start:       | looks for the ticket in each    |
    |            | `look_since`                               | channel it may be in; posts it  |
    | unsure     | a post may have worked: `is_unsure`; from  | looks for the ticket there, and |
    |            | here on, `channel_id` stays                | posts it if there is none       |
    | posted     | there is a ticket: `post_id`               | posts other answers, as a reply |
    | confirmed  | a submission has succeeded                 | is not confirmed again          |
    """

    asked: State
    team_id: str = ""  # where /ticket was typed, if that is known
    response_hook: str = ""  # of /ticket, to confirm by; "" if it is not known any more
    look_since: int = 0  # seconds; posts since then may hold its ticket; 0: surely none does
    lock: threading.Lock = field(default_factory=threading.Lock)
    channel_id: str = ""  # where its ticket goes
    is_unsure: bool = False
    ticket_id: str = ""
    post_id: str = ""
    posted_print: str = ""  # of the answers in the ticket, or those posted after
    was_found: bool = False  # its ticket may have its replies already
    is_confirmed: bool = False


class Tickets:
    """Makes one ticket of a draft, and its thread."""

    clocks_differ = 300  # seconds, Mattermost's and ours, at most
    wait_at_stop = 10  # seconds

    def __init__(self, service: TicketService) -> None:
        self.service, self.form = service, service.form
        self.mattermost, self.channels = service.mattermost, service.channels
        self.ids = TicketIds()

    def post(self, draft: Draft, answers: Answers) -> None:
        """Make sure that there is a ticket, and that answers are in it, or in its thread."""
        if not draft.post_id:
            self.find_or_make(draft, answers)
        if draft.posted_print != fingerprint(answers.values):
            self.post_other_answers(draft, answers)

    def proofs(self, purpose: str, draft: Draft) -> list[str]:
        """Return signatures of a draft's nonce, one for each slash token; the first for new posts.

        They prove that a post is of this dialog, and what it is: its `purpose`. The nonce itself
        would not do: people can read it in the state, and use it first as the pending_post_id of a
        post of their own. In a ticket's props, the proof is called "nonce", as it always was.
        """
        return self.service.seal.signatures(purpose, draft.asked.nonce)

    def find_or_make(self, draft: Draft, answers: Answers) -> None:
        """Let a draft have its ticket: that of an earlier try, or a new one."""
        proofs = self.proofs("ticket", draft)
        made = self.mattermost.retried(
            lambda: self.earlier(draft, proofs) or self.make(draft, answers, proofs))
        draft.ticket_id, draft.post_id, draft.channel_id = made.id, made.post_id, made.channel_id
        draft.posted_print = made.answers_print
        # Mattermost answers a pending_post_id that it knows with the post that it made then. Only
        # such an old one can have replies.
        draft.was_found |= made.reply_count > 0
        log.info("ticket=%s user=%s channel=%s post=%s", draft.ticket_id, draft.asked.user_name,
                 draft.channel_id, draft.post_id)

    def earlier(self, draft: Draft, proofs: list[str]) -> Ticket | None:
        """Return the ticket that an earlier try of the same draft may have made, or None."""
        if not draft.look_since:
            return None
        channels = [draft.channel_id]
        if not draft.is_unsure:  # an earlier process may have sent it elsewhere
            channels += [*self.form.channels, self.channels.usual_channel(draft.asked.channel_id)]
        for channel_id in dict.fromkeys(channels):
            if ticket := self.earlier_in(channel_id, draft, proofs):
                draft.was_found = True
                return ticket
        return None

    def earlier_in(self, channel_id: str, draft: Draft, proofs: list[str]) -> Ticket | None:
        """Return the ticket that an earlier try may have made in a channel, or None."""
        sentence = (NOT_KNOWN_BY_ID if draft.is_unsure else NOT_KNOWN).format(
            ticket_id=draft.ticket_id)
        since = (draft.look_since - self.clocks_differ) * 1000
        try:
            posts = self.mattermost.get_channel_posts(channel_id, since)
            bot_id = self.mattermost.bot_id()
        except MattermostError as error:
            if isinstance(error, AnswerTooLong) or (draft.is_unsure and not error.may_pass):
                raise Problem(sentence, log=error) from error  # we can't see what has become of it
            # A bot that may post everywhere may not read there. Most dialogs that we have
            # forgotten were not submitted before: so rather a second ticket than none.
            if isinstance(error, NotAllowed):
                return None
            raise  # what may pass is tried again
        for post in posts:
            ticket = Ticket.from_post(post)
            if (ticket and ticket.data.get("nonce") in proofs and post.get("user_id") == bot_id
                    and not post.get("delete_at")):
                return ticket
        if len(posts) >= POSTS:  # a full page: the ticket may be among those that we did not get
            raise Problem(sentence)
        return None

    def make(self, draft: Draft, answers: Answers, proofs: list[str]) -> Ticket:
        """Return a new ticket, as Mattermost has made its post."""
        draft.ticket_id = draft.ticket_id or self.ids.next()
        asked, now = draft.asked, int(time.time())
        ticket = new_ticket(draft.ticket_id, self.form, answers, asked, proof=proofs[0],
                            thread_link=asked.root_id and self.mattermost.link(asked.root_id))
        check_length(ticket, self.mattermost)
        content = content_of(ticket, self.service)
        post = new_post(draft.channel_id, content["message"], proofs[0], **content["props"])
        try:
            made = Ticket.from_post(
                self.channels.create_post(post, asked.channel_id, draft.team_id))
            if not made or made.data.get("nonce") not in proofs:
                raise self.mattermost.odd_answer()
        except MattermostError as error:
            if error.may_have_worked:
                draft.is_unsure = True
                draft.look_since = draft.look_since or now
            raise
        return made

    def post_other_answers(self, draft: Draft, answers: Answers) -> None:
        """Post answers that are not in the ticket in its thread.

        That is so if an earlier try made the ticket, its response was lost, and the form was
        changed before it was submitted again.
        """
        posted, by = fingerprint(answers.values), draft.asked.user_name
        message = "\n".join([SUBMITTED_AGAIN.format(by=by), *self.form.body(answers)])
        self.channels.reply(draft.channel_id, draft.post_id, message,
                            pending_id=self.proofs(f"changed {posted}", draft)[0])
        draft.posted_print = posted

    def confirm(self, draft: Draft, names: Names) -> None:
        """Confirm the ticket to the reporter alone, and name people who are outside its channel."""
        asked, link = draft.asked, self.mattermost.link(draft.post_id)
        text = CONFIRMATION.format(ticket_id=draft.ticket_id, link=link)
        if draft.channel_id != asked.channel_id and self.service.directory.outside(
                draft.channel_id, [asked.user_id]):
            text += f"\n{YOU_ARE_OUTSIDE}"
        others = {person: name for person, name in names.items() if person != asked.user_id}
        if people := self.service.directory.people_outside(draft.channel_id, others):
            text += f"\n{THEY_ARE_OUTSIDE.format(people=people)}"
        try:
            if draft.response_hook:
                self.mattermost.answer_command(draft.response_hook, ephemeral(text))
                return
            log.info("ticket=%s response hook: not known any more", draft.ticket_id)
        except MattermostError as error:
            log.warning("ticket=%s response hook: %s", draft.ticket_id, error)
        try:
            self.mattermost.create_ephemeral_post(asked.user_id, asked.channel_id, text)
        except MattermostError as error:
            log.warning("ticket=%s was not confirmed to user=%s: %s",
                        draft.ticket_id, asked.user_name, error)

    def begin_thread(self, draft: Draft) -> None:
        """Reply to a ticket: from then on, its reporter follows the thread.

        A reply in the thread where it was asked for leads to it.
        """
        self.reply_once(draft, draft.channel_id, draft.post_id, FIRST_REPLY, "reply")
        if root_id := draft.asked.root_id:
            pointer = ASKED_HERE.format(
                ticket_id=draft.ticket_id, link=self.mattermost.link(draft.post_id))
            self.reply_once(draft, draft.asked.channel_id, root_id, pointer, "asked here")

    def reply_once(self, draft: Draft, channel_id: str, root_id: str, message: str,
                   purpose: str) -> None:
        """Reply in a thread, unless an earlier try has; a failure is only logged."""
        try:
            # Where it was asked for, look for the ID only: the link changes with the SiteURL.
            trace = message if root_id == draft.post_id else f"#{draft.ticket_id}"
            if not (draft.was_found and self.has_replied(root_id, trace)):
                self.channels.reply(channel_id, root_id, message,
                                    pending_id=self.proofs(purpose, draft)[0])
        except (Problem, MattermostError) as error:
            log.warning("ticket=%s a reply is missing: %s", draft.ticket_id, error)

    def has_replied(self, root_id: str, trace: str) -> bool:
        """Return whether the bot has a reply with this text in a thread."""
        bot_id = self.mattermost.bot_id()
        return any(post.get("user_id") == bot_id and trace in str(post.get("message"))
                   for post in self.mattermost.get_post_thread(root_id)
                   if post.get("root_id") == root_id)

    def close(self) -> None:
        """Wait until the clock has passed the last ID: else the next start could give it again."""
        ahead = self.ids.ahead()
        if ahead > self.wait_at_stop:
            log.warning("start again in %d s at the earliest: until then, ticket IDs could repeat",
                        int(ahead) + 1)
        time.sleep(min(ahead, self.wait_at_stop))


@dataclass(slots=True)
class Change:
    """A change of a ticket, by a press or an Edit, and how its patch went.

    | failure           | the patch was               | the person is told   | the thread is told  |
    |-------------------|-----------------------------|----------------------|---------------------|
    | none              | made                        | nothing: they see it | at once             |
    | `is_edit_refused` | refused: posts may not be   | nothing: the         | when the post shows |
    | in a press        | edited, or not for so long, | response asks for    | the change          |
    |                   | or no PUT gets through      | the update           |                     |
    | `is_edit_refused` | the same                    | why it can't be      | nothing             |
    | in an Edit        |                             |                      |                     |
    | `may_have_worked` | not answered                | to look at it        | when the post shows |
    |                   |                             |                      | the change          |
    """

    ticket: Ticket  # as it becomes
    reply: str  # for its thread
    reply_props: Json = field(default_factory=dict)
    content: Json = field(default_factory=dict)  # of its post
    failure: MattermostError | None = None


@dataclass(slots=True)
class TicketMemory:
    """What we know of a ticket: its lock, and the newest state of its post."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    update_at: int = 0  # of its post, in milliseconds
    entry: Json = field(default_factory=dict)  # the last of its history
    status: Json = field(default_factory=dict)  # status, status_by and status_at
    answers_print: str = ""

    def is_newer_than(self, ticket: Ticket) -> bool:
        """Return whether we know of a change that a ticket does not show yet.

        The times alone do not tell: Mattermost's clock may be set back, and its nodes' may differ.
        """
        return ticket.update_at < self.update_at and self.entry not in ticket.history

    def learn(self, ticket: Ticket, update_at: int) -> None:
        """Remember a ticket's state, unless a newer one is known."""
        if not self.is_newer_than(ticket):
            self.update_at, self.entry = update_at, ticket.history[-1]
            self.status = {key: ticket.data[key] for key in ("status", "status_by", "status_at")}
            self.answers_print = ticket.answers_print


class Changes:
    """The one way to change a ticket: its post is read, the change decided, and the post patched.

    One change of a ticket at a time. A change counts as made when Mattermost has answered the
    patch. Whoever comes too late can be told so: a button carries the status_at that it belongs to,
    a form to edit the fingerprint of the answers it began with.
    """

    # Seconds before each look at the post, if the patch was refused, or not answered.
    pauses_for_update = (1.0, 1.0)
    pauses_for_silence = (1.0, 2, 4, 8, 16, 32)

    def __init__(self, service: TicketService) -> None:
        self.service, self.mattermost = service, service.mattermost
        self.memories: Recent[TicketMemory] = Recent()  # by post ID

    def press(self, post_id: str, ticket_id: str, status_at: int, wanted: str, by: User,
              to: User) -> Change:
        """Change a ticket as a press wants it; raise Problem if it came too late."""
        change = self.make(post_id, ticket_id, lambda ticket: (
            self.decide_press(ticket, status_at, wanted, by, to)))
        assert change  # a press has one, or raises
        return change

    def edit(self, asked: EditState, submission: Submission) -> Change | None:
        """Give a ticket the submitted answers; return None if nothing is new."""
        return self.make(asked.post_id, asked.ticket_id, lambda ticket: (
            self.decide_edit(ticket, asked, submission)))

    def make(self, post_id: str, ticket_id: str, decide: Callable[[Ticket], Change | None]
             ) -> Change | None:
        """Change a ticket as decide() says; return the change, None if there was none to make.

        A patch without an answer is made again: it is the same each time.
        """
        memory = self.memories.get_or_add(post_id, TicketMemory())
        with memory.lock:
            ticket = self.read(post_id, ticket_id)
            change = decide(ticket)
            if not change:
                return None
            self.refuse_stale(ticket)  # after decide(): who was too late has been told so
            content = change.content = content_of(change.ticket, self.service)
            try:
                post = self.mattermost.retried(lambda: self.mattermost.patch_post(post_id, content))
                memory.learn(change.ticket, whole_number(post.get("update_at")))
            except MattermostError as error:
                if not (error.may_have_worked or error.is_edit_refused):
                    raise
                log.info("ticket=%s was not patched: %s", ticket_id, error)
                change.failure = error
        return change

    def read(self, post_id: str, ticket_id: str) -> Ticket:
        """Return a ticket as it is now; raise Problem if it is not one of ours.

        A database replica may lag behind: what is older than our last patch is read again for a
        while, and then is judged by what we know of it.
        """
        memory = self.memories.get_or_add(post_id, TicketMemory())
        while True:
            ticket = self.mattermost.retried(lambda: self.read_once(post_id, ticket_id))
            if not memory.is_newer_than(ticket):
                return ticket
            if not self.mattermost.waited(self.mattermost.pause):
                return replace(ticket, is_stale=True, answers_print=memory.answers_print,
                               props=ticket.props_with(**memory.status))

    def read_once(self, post_id: str, ticket_id: str) -> Ticket:
        """Return a ticket as Mattermost shows it; raise Problem if it is not one of ours."""
        post, bot_id = self.mattermost.get_post(post_id), self.mattermost.bot_id()
        ticket = Ticket.from_post(post)
        if not ticket or ticket.id != ticket_id or post.get("user_id") != bot_id:
            raise Problem(NOT_OUR_TICKET)
        if ticket.status not in STATUSES:
            raise Problem(UNKNOWN_STATUS.format(status=inline_code(one_line(ticket.status))))
        return ticket

    def refuse_stale(self, ticket: Ticket) -> None:
        """Raise MattermostError if a ticket's post is older than what we know of it."""
        if ticket.is_stale:
            raise MattermostError("Mattermost still shows the ticket as it was before", 503)

    def decide_press(self, ticket: Ticket, status_at: int, wanted: str, by: User, to: User
                     ) -> Change:
        """Return the change that a press asks for; raise Problem if it came too late.

        `status_at` is that of the ticket when the button was made; `to` has the ticket after that.
        """
        status = TAKEN if wanted == HAND_OVER else wanted
        is_same = (status, to.name) == (ticket.status, ticket.status_by)
        if ticket.status_at != status_at or is_same or wanted not in STATUSES[ticket.status].steps:
            raise Problem(ticket.already())
        # @taker is a mention, unless reporters take their own ticket. The reporter is mentioned as
        # well, unless they pressed, or are the taker.
        by_reporter, to_reporter = by.id == ticket.reporter.id, to.id == ticket.reporter.id
        reply = (HANDED_OVER if to != by else STATUSES[status].reply).format(
            by=by.name, taker=to.name if by_reporter and to_reporter else f"@{to.name}")
        if not to_reporter:
            reply = ticket.for_reporter(reply, by.id)
        return Change(ticket.with_status(status, by, to), reply)

    def decide_edit(self, ticket: Ticket, asked: EditState, submission: Submission
                    ) -> Change | None:
        """Return the change that an Edit asks for, whatever status the ticket has; or None."""
        form, directory = self.service.form, self.service.directory
        values = self.edited_values(ticket, submission, opened=asked.time)
        if fingerprint(values) == ticket.answers_print:
            return None
        if ticket.answers_print != asked.answers_print:
            raise Problem(EDITED_MEANWHILE.format(ticket_id=ticket.id))
        self.refuse_stale(ticket)  # nothing may be worked out from an older post
        answers = Answers(
            values, directory.names(form.answered(values), ticket.channel_id, ticket.old_names))
        changed = ticket.with_answers(form, answers, User(asked.user_id, asked.user_name))
        if not changed:
            raise Problem(NOT_EDITABLE)
        check_length(changed, self.mattermost)
        news = [ticket.for_reporter(EDITED.format(by=asked.user_name), asked.user_id),
                *form.news(ticket.answers, answers)]
        if people := directory.people_outside(ticket.channel_id, {
                person: name for person, name in answers.names.items()
                if person not in ticket.old_names}):
            news.append(TO_EDITOR.format(
                by=asked.user_name, sentence=THEY_ARE_OUTSIDE.format(people=people)))
        # The old answers are kept beside the reply, for whoever wants them back.
        return Change(changed, "\n".join(news), {"ticket_before": ticket.answers})

    def edited_values(self, ticket: Ticket, submission: Submission, opened: int) -> Json:
        """Return the answers in an Edit: what nobody has changed is exactly as in the ticket."""
        form = self.service.form
        # A form can't show people and channels chosen before: where it is left empty, they stay.
        values = form.values_in(
            form.keeping_people_and_channels(submission.answers, ticket.answers), opened)
        for name, old in ticket.answers.items():
            if name in values and listed(values[name]) == listed(old):
                values[name] = old  # a select that has become multiselect gives ["a"] for "a"
        # A box that the form did not have then, and that is not ticked, is no change.
        return {name: answer for name, answer in values.items()
                if answer is not False or name in ticket.answers}

    def tell_thread(self, change: Change | None) -> None:
        """Post a change's reply in the ticket's thread, once the post shows the change."""
        if not change:
            return
        ticket, entry = change.ticket, change.ticket.history[-1]
        what = " ".join(f"{key}={value}" for key, value in entry.items() if key != "at")
        if change.failure and not self.is_seen_in_post(change):
            log.warning("ticket=%s was not seen to change: %s: %s", ticket.id, what,
                        change.failure)
            return
        log.info("ticket=%s %s", ticket.id, what)
        try:
            with self.mattermost.retrying():
                self.service.channels.reply(
                    ticket.channel_id, ticket.post_id, change.reply, **change.reply_props)
        except (Problem, MattermostError) as error:
            log.warning("ticket=%s: the thread was not told: %s", ticket.id, error)

    def is_seen_in_post(self, change: Change) -> bool:
        """Wait until the post shows a change whose patch was refused or not answered."""
        is_unsure = change.failure and change.failure.may_have_worked
        pauses = self.pauses_for_silence if is_unsure else self.pauses_for_update
        for pause in pauses:
            time.sleep(pause)
            with contextlib.suppress(MattermostError, Problem):
                ticket = self.read_once(change.ticket.post_id, change.ticket.id)
                if change.ticket.history[-1] in ticket.history:
                    memory = self.memories.get_or_add(ticket.post_id, TicketMemory())
                    memory.learn(ticket, ticket.update_at)
                    return True
        return False


# ----------------------------------------------------- 3. A ticket, its ID, and what is signed
#
# The only place that knows what a ticket's post looks like. It promises that a change touches
# nothing but what it is about, whatever else somebody has edited in the post.

MARKS = "|".join(re.escape(status.mark) for status in STATUSES.values())
MARKED_HEADING_RE = re.compile(rf"^(#+ )(?:{MARKS})(?!\S)", re.MULTILINE)
TAGS = "|".join(re.escape(status.tag[1:]) for status in STATUSES.values())
# A tag without its #. In a longer hashtag that begins like one, as #ticket-open-2, there is none.
TAG_NAME = f"(?:{TAGS})(?![-_.]*[a-z0-9])"
TAGGED_LINE_RE = re.compile(f"^.*#{TAG_NAME}.*$", re.MULTILINE | re.IGNORECASE)
# Up to the third version: "#### #Ticket-… · @alice", and "**Status:** #ticket-taken by @bob".
OLD_STATUS = "**Status:** "
OLD_LOOK_RE = re.compile(rf"^(?:#### #Ticket-|{re.escape(OLD_STATUS)}#{TAG_NAME})", re.MULTILINE)
# How the lines begin that may stand between the second one and the answers: their fixed words.
BEFORE_ANSWERS_RE = re.compile("|".join(
    re.escape(re.split("[{[]", line)[0]) for line in (THREAD, FOR)))
HISTORY_ENTRIES, HISTORY_BYTES = 50, 8192


class User(NamedTuple):
    """Somebody in Mattermost."""

    id: str
    name: str


class Answers(NamedTuple):
    """What a person typed and chose: JSON values by element name, and a Name for each ID."""

    values: Json
    names: Names


@dataclass(frozen=True)
class Ticket:
    """What a ticket's post says.

    `props` are those of the post. `data` is the part of them that is ours: `user_id`, `user_name`,
    `answers`, `names`, `created_at`, `nonce`, `status`, `status_by`, `status_at`, `history`, and
    `body`: how many lines of the message show the answers, and their SHA-256.
    """

    id: str
    post_id: str
    channel_id: str
    message: str
    props: Json
    update_at: int = 0  # milliseconds; of the post
    answers_print: str = ""  # fingerprint; not of a new ticket
    reply_count: int = 0
    is_stale: bool = False  # the post is older than status and answers_print

    @classmethod
    def from_post(cls, post: Json) -> Ticket | None:
        """Return the ticket in a post, None if there is no sound one."""
        with contextlib.suppress(LookupError, TypeError):
            ticket = cls(id=post["props"]["ticket_id"], post_id=post["id"],
                         channel_id=post["channel_id"], message=post["message"],
                         props=post["props"], update_at=whole_number(post.get("update_at")),
                         reply_count=whole_number(post.get("reply_count")),
                         answers_print=fingerprint(post["props"]["ticket"]["answers"]))
            data = ticket.data
            if (matching(TICKET_ID_RE, ticket.id) and matching(ID_RE, ticket.post_id)
                    and matching(ID_RE, ticket.channel_id) and isinstance(ticket.message, str)
                    and matching(ID_RE, data["user_id"]) and whole_number(data["status_at"])
                    and matching(USER_NAME_RE, data["user_name"])
                    and matching(USER_NAME_RE, data["status_by"])
                    and isinstance(data["status"], str) and isinstance(data["answers"], dict)):
                return ticket
        return None

    @property
    def data(self) -> Json:
        """Return the part of the post's props that is ours."""
        data: Json = self.props["ticket"]
        return data

    @property
    def reporter(self) -> User:
        """Return the person who asked for the ticket."""
        return User(self.data["user_id"], self.data["user_name"])

    @property
    def status(self) -> str:
        """Return a key of STATUSES."""
        return str(self.data["status"])

    @property
    def status_by(self) -> str:
        """Return the user name of whoever has the ticket, closed it, or opened it."""
        return str(self.data["status_by"])

    @property
    def status_at(self) -> int:
        """Return when it got its status, in milliseconds.

        No two statuses of a ticket have the same: so it tells which one a button was made for.
        """
        return int(self.data["status_at"])

    @property
    def answers(self) -> Json:
        """Return the answers, by element name."""
        answers: Json = self.data["answers"]
        return answers

    @property
    def old_names(self) -> dict[str, str]:
        """Return the names of people and channels in the answers, by ID, as they were then."""
        names = self.data.get("names")
        return {one: one_line(name) for one, name in names.items()
                if isinstance(name, str)} if isinstance(names, dict) else {}

    @property
    def history(self) -> list[Json]:
        """Return what has become of the ticket: `status`, `by`, `at`; perhaps `to` or `edited`.

        Of a ticket from before there was a history, it is the last status.
        """
        entries = self.data.get("history")
        sound = [entry for entry in objects(entries if isinstance(entries, list) else [])
                 if isinstance(entry.get("status"), str) and whole_number(entry.get("at"))
                 and matching(USER_NAME_RE, entry.get("by"))]
        return sound or [{"status": self.status, "by": self.status_by, "at": self.status_at}]

    @property
    def editor(self) -> str:
        """Return who was the last to edit the ticket, "" if that was the reporter, or nobody."""
        editor = next((entry["by"] for entry in reversed(self.history) if "edited" in entry), "")
        return "" if editor == self.reporter.name else editor

    def already(self) -> str:
        """Return the sentence for a press that came too late."""
        return STATUSES[self.status].already.format(status_by=self.status_by)

    def for_reporter(self, reply: str, by_id: str) -> str:
        """Return a reply about what somebody did; the reporter is mentioned, if it was not them."""
        if by_id == self.reporter.id:
            return reply
        return TELL_REPORTER.format(reply=reply, reporter=self.reporter.name)

    def with_status(self, status: str, by: User, to: User) -> Ticket:
        """Return the ticket with a status that somebody gave it; `to` has it then."""
        at = max(milliseconds(), self.status_at + 1)
        entry = {"status": status, "by": by.name, "at": at} | (
            {"to": to.name} if to != by else {})
        return replace(self, props=self.props_with(
            entry, status=status, status_by=to.name, status_at=at)).with_own_lines()

    def with_answers(self, form: Form, answers: Answers, by: User) -> Ticket | None:
        """Return the ticket with other answers; None if somebody has edited the old ones by hand.

        The heading follows, if it is still ours.
        """
        span = self.body_lines()
        if span is None:
            return None
        old_subject, subject = (form.subject(values) or self.id
                                for values in (self.answers, answers.values))
        lines = self.message.split("\n")
        in_heading = ""  # if the heading is no longer ours, the body has to show all
        for number, line in enumerate(lines[:span.start]):
            marked = MARKED_HEADING_RE.match(line)
            if marked and line[marked.end():] == f" {old_subject}":
                lines[number], in_heading = f"{marked[0]} {subject}", subject
        body, below = form.body(answers, in_heading), lines[span.stop:]
        # What somebody has added below must not become a part of a quote.
        room = [""] if body and body[-1].startswith(">") and below and below[0] else []
        message = "\n".join([*lines[:span.start], *body, *room, *below])
        changed = {name for name in {**self.answers, **answers.values}
                   if self.answers.get(name) != answers.values.get(name)}
        # Reporters have the name that they had then, since `editor` looks for it.
        entry = {"status": self.status, "at": milliseconds(), "edited": sorted(changed),
                 "by": self.reporter.name if by.id == self.reporter.id else by.name}
        props = self.props_with(entry, answers=answers.values, names=names_of(answers),
                                body=body_print(body))
        return replace(self, message=message, props=props,
                       answers_print=fingerprint(answers.values)).with_own_lines()

    def props_with(self, entry: Json | None = None, **data: Any) -> Json:
        """Return the props with changed data, and perhaps an entry more in the history."""
        if entry:
            history = [*self.history, entry]
            last_edit = next((one for one in reversed(history) if "edited" in one), None)
            # The oldest go, but not the last edit: `editor` needs it.
            while len(history) > 2 and (len(history) > HISTORY_ENTRIES
                                        or len(json_bytes(history)) > HISTORY_BYTES):
                del history[1 if history[0] is last_edit else 0]
            data["history"] = history
        return {**self.props, "ticket": {**self.data, **data}}

    def with_own_lines(self) -> Ticket:
        """Return the ticket with its status line and its heading's mark brought up to date."""
        if line := status_line(self.message, self.id):
            before, after = self.message[:line.start()], self.message[line.end():]
        elif (span := self.body_lines()) and span.start == 0:  # edited away, with the heading
            before, after = "", f"\n{self.message}"
        else:  # it was edited away: it becomes the second line
            marked = MARKED_HEADING_RE.search(self.message)
            start = marked.start() if marked else 0
            heading_line, line_end, rest = self.message[start:].partition("\n")
            before, after = f"{self.message[:start]}{heading_line}\n", line_end + rest
        if has_old_look(self.message, self.id):
            own = OLD_STATUS + status_text(self.status, self.status_by)
        else:
            own = second_line(
                self.id, self.reporter.name, self.status, self.status_by, self.editor)
            # The nearest above the line is ours: others may have been put in front.
            if headings := list(MARKED_HEADING_RE.finditer(before)):
                start, end_of_mark = headings[-1].span()
                mark = headings[-1][1] + STATUSES[self.status].mark
                before = before[:start] + mark + before[end_of_mark:]
        return replace(self, message=before + own + after)

    def body_lines(self) -> range | None:
        """Return which lines of the message show the answers; None if they are not found.

        Somebody may have edited them by hand, or the ticket is from before there was `body`.
        """
        lines = self.message.split("\n")
        with contextlib.suppress(LookupError, TypeError, ValueError):
            body = self.data["body"]
            number = body[0]
            # Where no line was shown, it would be found everywhere.
            starts = range(len(lines) - number + 1) if number else self.empty_body(lines)
            for start in starts:
                if body_print(lines[start:start + number]) == body:
                    return range(start, start + number)
        return None

    def empty_body(self, lines: list[str]) -> list[int]:
        """Return where an empty body stands: behind the second line, and what belongs to it."""
        if not (line := status_line(self.message, self.id)):
            return []
        start = self.message.count("\n", 0, line.end()) + 1
        while start < len(lines) and BEFORE_ANSWERS_RE.match(lines[start]):
            start += 1
        return [start]


def new_ticket(ticket_id: str, form: Form, answers: Answers, asked: State, *, proof: str,
               thread_link: str) -> Ticket:
    """Return a ticket that is still to be posted."""
    now, by = milliseconds(), asked.user_name
    subject = form.subject(answers.values) or ticket_id
    body = form.body(answers, subject)
    lines = [HEADING.format(mark=STATUSES[NEW].mark, subject=subject),
             second_line(ticket_id, by, NEW, by)]
    lines += [THREAD.format(link=thread_link)] if thread_link else []
    lines += [FOR.format(mention=form.mention)] if form.mention else []
    data = {"user_id": asked.user_id, "user_name": by, "answers": answers.values,
            "names": names_of(answers), "created_at": now,
            "nonce": proof,
            "status": NEW, "status_by": by, "status_at": now,
            "history": [{"status": NEW, "by": by, "at": now}], "body": body_print(body)}
    return Ticket(id=ticket_id, post_id="", channel_id="", message="\n".join([*lines, *body]),
                  props={"is_ticket": True,  # for scripts
                         "ticket_id": ticket_id, "ticket": data})


def status_line(message: str, ticket_id: str) -> re.Match[str] | None:
    """Return the match of a message's status line: ours, or else the first line with a tag."""
    lines = list(TAGGED_LINE_RE.finditer(message))
    own = OLD_STATUS if has_old_look(message, ticket_id) else f"#{ticket_id}"
    return next((line for line in lines if own in line[0]), lines[0] if lines else None)


def has_old_look(message: str, ticket_id: str) -> bool:
    """Return whether a ticket has the look of the first three versions: see OLD_LOOK_RE."""
    is_new = any(f"#{ticket_id}" in line for line in TAGGED_LINE_RE.findall(message))
    return not is_new and bool(OLD_LOOK_RE.search(message))


def status_text(status: str, status_by: str) -> str:
    """Return a ticket's words for a status, tag included."""
    return STATUSES[status].line.format(status_by=status_by)


def second_line(ticket_id: str, reporter: str, status: str, status_by: str, editor: str = ""
                ) -> str:
    """Return the line of a ticket that says what can change.

    It stands before anything typed but the subject: of a post's hashtags, Mattermost keeps the
    first 1,000 characters.
    """
    edited = EDITED_BY.format(user_name=editor) if editor else ""
    return SECOND_LINE.format(ticket_id=ticket_id, reporter=reporter,
                              status=status_text(status, status_by)) + edited


def body_print(lines: list[str]) -> list[int | str]:
    """Return [number of lines, SHA-256], by which the answers are found in a message again."""
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()
    return [len(lines), digest]


def names_of(answers: Answers) -> dict[str, str]:
    """Return the names in answers by ID, as the props keep them."""
    return {one: name.name for one, name in answers.names.items()}


def check_length(ticket: Ticket, mattermost: Mattermost) -> None:
    """Raise Problem if a ticket is too long for Mattermost, or would be with another status."""
    def line_length(status: str, status_by: str, editor: str) -> int:
        return len(second_line(ticket.id, ticket.reporter.name, status, status_by, editor))

    longest_name = "x" * 64
    longest = max(line_length(status, longest_name, longest_name) for status in STATUSES)
    growth = longest - line_length(ticket.status, ticket.status_by, ticket.editor)
    length = len(ticket.message) + growth
    if length <= MAX_POST_SIZE:  # at four bytes for each, twice, it is below all limits of bytes
        return
    # Three limits: characters of the message; its bytes, as Mattermost looks for no mention in a
    # longer one; bytes of the whole post.
    size = len(ticket.message.encode("utf-8", "replace")) + growth
    whole = len(json_bytes({"message": ticket.message, "props": ticket.props})) + growth
    too_many = (whole - POST_BYTES + 1) // 2  # what is typed stands in the message and in the props
    excess = max(length - mattermost.max_post_size(),
                 characters_to_cut(ticket.message, size - MENTIONED_BYTES, str.encode),
                 characters_to_cut(ticket.message, too_many, json_bytes))
    if excess > 0:
        raise Problem(TICKET_TOO_LONG.format(excess=excess))


def characters_to_cut(text: str, size: int, to_bytes: Callable[[str], bytes]) -> int:
    """Return the number of characters at the end of a text that have so many bytes at least."""
    empty = len(to_bytes(""))
    sizes = itertools.accumulate(
        (len(to_bytes(character)) - empty for character in reversed(text)), initial=0)
    return next((number for number, total in enumerate(sizes) if total >= size), len(text))


def new_post(channel_id: str, message: str, pending_post_id: str, root_id: str = "",
             **props: Any) -> Json:
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


def content_of(ticket: Ticket, service: TicketService) -> Json:
    """Return `message` and `props` for a ticket's post, buttons and menu included."""
    status, url = STATUSES[ticket.status], service.settings.callback_url + "/ticket/action"
    menu, button = {"type": "select", "data_source": "users"}, {"type": "button"}
    # Mattermost looks the pressed ID up in the post as it is now: since the ID holds the status, an
    # outdated button is not found.
    actions = [
        {"id": ticket.status + wanted, "name": name, **(menu if wanted == HAND_OVER else button),
         "integration": {"url": url, "context": {"signed": service.seal.sign(
             "action", ticket.id, ticket.status_at, wanted)}}}
        for wanted, name in status.steps.items()
        # An older ticket does not say which lines are its answers.
        if wanted != EDIT or "body" in ticket.data]
    attachments = [{"color": status.color, "actions": actions}]
    return {"message": ticket.message, "props": {**ticket.props, "attachments": attachments}}


# Its ID

TICKET_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's: none looks like another
TICKET_ID_RE = re.compile(rf"Ticket-[0-9]{{8}}-[{TICKET_DIGITS}]{{4}}")
IDS_PER_DAY = len(TICKET_DIGITS) ** 4
DAY, HOUR = 24 * 60 * 60, 60 * 60  # seconds


class TicketIds:
    """Ticket-YYYYMMDD-XXXX: the day (UTC) and its 1,048,576 IDs, spread evenly over the hours.

    So IDs sort by time and need no storage. The next one is that of now or, if that is later, the
    one after the last. (A last one that lies more than an hour ahead came of a wrong reading of the
    clock, and does not count.)
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock, self.lock = clock, threading.Lock()
        self.last = -1  # number of the last ID, counted from 1970

    def next(self) -> str:
        """Return the next ID."""
        with self.lock:
            now = int(self.clock() * IDS_PER_DAY / DAY)
            if self.last > now + IDS_PER_DAY * HOUR / DAY:
                self.last = -1
            number = max(self.last + 1, now)
            if number > now and number % IDS_PER_DAY == 0:
                raise Problem(DAY_FULL)
            self.last = number
        day, number = divmod(number, IDS_PER_DAY)
        date = time.strftime("%Y%m%d", time.gmtime(day * DAY))
        digits = "".join(TICKET_DIGITS[number >> shift & 31] for shift in (15, 10, 5, 0))
        return f"Ticket-{date}-{digits}"

    def ahead(self) -> float:
        """Return the seconds by which the last ID is ahead of the clock, or 0."""
        seconds = (self.last + 1) * DAY / IDS_PER_DAY - self.clock()
        return seconds if 0 < seconds <= HOUR else 0


# What is signed

class Seal:
    """Signs what passes through other hands and must come back unchanged.

    The keys are derived from the slash tokens, which prove that a request is Mattermost's: so the
    bot's token can change, and a slash token too, as long as the old one stands behind the new.
    To derive them in another way, or to rename a purpose, would break the buttons of all tickets
    that there are.
    """

    def __init__(self, slash_tokens: list[bytes]) -> None:
        self.keys = [hmac.digest(token, b"mattermost-ticket", "sha256") for token in slash_tokens]

    def sign(self, purpose: str, *fields: Any) -> str:
        """Return a text that holds the fields and can only be opened for the same purpose."""
        payload = base64.urlsafe_b64encode(json_bytes(fields)).decode()
        return f"{payload}.{self.signatures(purpose, payload)[0]}"

    def open(self, purpose: str, text: str) -> list[Any] | None:
        """Return the fields in an ASCII text; None if not signed by us for this purpose."""
        payload, _, signature = text.partition(".")
        if not is_among(signature.encode(), [
                one.encode() for one in self.signatures(purpose, payload)]):
            return None
        fields: list[Any] = json.loads(base64.urlsafe_b64decode(payload))
        return fields

    def signatures(self, purpose: str, payload: str) -> list[str]:
        """Return the signatures of a payload: that of the first key is the one to use."""
        signed = (hmac.digest(key, f"{purpose}.{payload}".encode(), "sha256") for key in self.keys)
        return [base64.urlsafe_b64encode(one).decode() for one in signed]


def is_among(secret: bytes, known: list[bytes]) -> bool:
    """Return whether a secret is known; how long that takes does not tell which one it is."""
    return bool(sum(hmac.compare_digest(secret, one) for one in known))


class State(NamedTuple):
    """The state of a dialog for a new ticket, in the order in which it is signed."""

    user_id: str
    user_name: str
    channel_id: str  # where /ticket was typed
    root_id: str  # in which thread, or ""
    time: int  # when, in seconds
    form_print: str  # fingerprint of the form that was opened
    nonce: str  # one for each dialog


class EditState(NamedTuple):
    """The state of a dialog for an Edit, in the order in which it is signed."""

    user_id: str
    user_name: str
    post_id: str
    ticket_id: str
    time: int  # when it was opened, in seconds
    form_print: str  # fingerprint of the form that was opened
    answers_print: str  # fingerprint of the answers that it began with


MAX_STATE_AGE = DAY
PURPOSES: dict[type[State | EditState], str] = {State: "state", EditState: "edit"}


def opened_state(seal: Seal, submission: Submission, form_print: str) -> State | EditState:
    """Return a submission's state; raise Problem if it is not of this user and form, or old."""
    for kind, purpose in PURPOSES.items():
        fields = seal.open(purpose, submission.state) or []
        if len(fields) == len(kind._fields):  # else it is another version's, or none of ours
            state = kind(*fields)
            if (state.user_id == submission.user_id and state.form_print == form_print
                    and time.time() - state.time <= MAX_STATE_AGE):
                return state
    raise Problem(FORM_INVALID)


# ------------------------------------------------------------------------------------ 4. Mattermost
#
# What it says to us, and what we ask of it. It promises that all of this is checked where it comes
# in, and that what an error means is decided once.

MAX_FORM_FIELDS = 1000  # Mattermost repeats keys for everybody who is mentioned in the text
MAX_DEPTH = 500  # brackets of JSON that are open at a time: each takes a part of a thread's stack
JSON_STRING_RE = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
BRACKET_RE = re.compile(r"[][{}]")
TOKEN_FIELD_RE = re.compile(rb"(?:^|&)token=([^&]*)")
HOOK_RE = re.compile(r"/([A-Za-z0-9]+)$")
ID_RE = re.compile("[A-Za-z0-9]{1,64}")  # of anything in Mattermost: what may become part of a URL
CHOSEN_ID_RE = re.compile("[A-Za-z0-9]{26}")  # not a word such as me, which the API knows as well
USER_NAME_RE = re.compile(r"[\w.:-]{1,64}", re.ASCII)  # a colon in those of shared channels
CHANNEL_NAME_RE = re.compile(r"[a-z0-9_-]{1,64}")
PRINTABLE_RE = re.compile("[!-~]+")
MAX_NUMBER = 2**53  # what JSON can hold exactly


class Refusal(Exception):
    """An HTTP request that Mattermost would not send: str() is the reason, for whoever sent it.

    `log` is what the log says of it.
    """

    def __init__(self, status: int, reason: str, *headers: str, log: str = "") -> None:
        super().__init__(reason)
        self.status, self.headers, self.log = status, headers, log or reason


def foreign_json(body: bytes) -> Any:
    """Return the value of JSON that is not ours; raise ValueError if it is bad, or nested deeply.

    json.loads() alone dies of deep nesting: on the 1 MiB stack of a thread, as on Alpine, so does
    Python. It would also take UTF-16 and UTF-32, in which brackets can't be counted as here.
    """
    text = body.decode()
    if text.count("[") + text.count("{") > MAX_DEPTH:  # people paste JSON and stack traces, too
        depths = itertools.accumulate(
            1 if bracket in "[{" else -1
            for bracket in BRACKET_RE.findall(JSON_STRING_RE.sub("", text)))
        if max(depths, default=0) > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
    return json.loads(text)


def json_object(body: bytes) -> Json:
    """Return the JSON object in the body of a request."""
    try:
        value = foreign_json(body)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {one_line(str(error))}") from error
    if not isinstance(value, dict):
        raise Refusal(400, "the body is not a JSON object")
    return value


def matching(pattern: re.Pattern[str], value: Any) -> str:
    """Return a text that a pattern matches as a whole; "" for anything else."""
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""


def whole_number(value: Any) -> int:
    """Return a positive whole number of Mattermost's; 0 for anything else."""
    return value if type(value) is int and 0 < value < MAX_NUMBER else 0


@dataclass(frozen=True)
class SlashCommand:
    """`/ticket`, as somebody typed it; Mattermost has checked who and where.

    https://developers.mattermost.com/integrate/slash-commands/custom/
    """

    user_id: str
    user_name: str
    channel_id: str
    team_id: str
    root_id: str  # of the thread it was typed in, says the client of Mattermost 11; else ""
    trigger_id: str
    text: str
    hook: str  # ID of the response URL; its host is never used, since a client can choose it

    @classmethod
    def from_body(cls, body: bytes, settings: Settings) -> SlashCommand:
        """Read the body, a form; its token must be one of ours."""
        # Looked at first: to read all of a form takes a hundred times as long.
        match = TOKEN_FIELD_RE.search(body)
        token = urllib.parse.unquote_to_bytes(match[1]) if match else b""
        if not is_among(token, settings.slash_tokens):
            raise Refusal(401, "SLASH_TOKEN does not hold the token of this slash command")
        try:
            fields = dict(urllib.parse.parse_qsl(
                body.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS))
        except ValueError as error:
            raise Refusal(400, "the body is not a form") from error
        user_id, channel_id, team_id, root_id = (matching(ID_RE, fields.get(name)) for name in (
            "user_id", "channel_id", "team_id", "root_id"))
        user_name = matching(USER_NAME_RE, fields.get("user_name"))
        trigger_id = fields.get("trigger_id")
        if not (user_id and channel_id and user_name and trigger_id):
            raise Refusal(400, "user_id, user_name, channel_id or trigger_id is missing or odd")
        hook = HOOK_RE.search(fields.get("response_url", ""))
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
    answers: Json
    cancelled: bool

    @classmethod
    def from_body(cls, body: bytes, _: Settings) -> Submission:
        """Read the body, a JSON object; what has the wrong type counts as empty."""
        fields = json_object(body)
        if fields.get("type") not in (None, "", "dialog_submission"):  # a look-up or a refresh
            fields = {}
        answers = fields.get("submission")
        return cls(
            user_id=matching(ID_RE, fields.get("user_id")),
            team_id=matching(ID_RE, fields.get("team_id")),
            state=matching(PRINTABLE_RE, fields.get("state")),
            answers=answers if isinstance(answers, dict) else {},
            cancelled=fields.get("cancelled") is True)


@dataclass(frozen=True)
class Press:
    """A button or a menu, as somebody pressed it. Only `signed` proves that it is one of ours.

    https://developers.mattermost.com/integrate/plugins/interactive-messages/
    """

    user_id: str
    user_name: str
    post_id: str
    trigger_id: str
    signed: str
    selected: str  # ID of a user, chosen in a menu; else ""

    @classmethod
    def from_body(cls, body: bytes, _: Settings) -> Press:
        """Read the body, a JSON object; what is missing or odd counts as empty."""
        fields = json_object(body)
        context = fields.get("context")
        context = context if isinstance(context, dict) else {}
        return cls(
            user_id=matching(ID_RE, fields.get("user_id")),
            user_name=matching(USER_NAME_RE, fields.get("user_name")),
            post_id=matching(ID_RE, fields.get("post_id")),
            trigger_id=matching(PRINTABLE_RE, fields.get("trigger_id")),
            signed=matching(PRINTABLE_RE, context.get("signed")),
            selected=matching(CHOSEN_ID_RE, context.get("selected_option")))


# What we say

DIALOG_BYTES = 290_000  # Mattermost takes 300,000 from us, the state included
POST_BYTES = 270_000  # of those: a ticket grows a little when it is closed
MENTIONED_BYTES = 128 * 1024  # of a message: in a longer one, Mattermost looks for no mention
MAX_POST_SIZE = 16_383  # characters of a message, unless Mattermost says that it takes more
# Without escapes: they would push a long ticket over Mattermost's limit of 300,000 bytes.
JSON = json.JSONEncoder(ensure_ascii=False)


def json_bytes(value: Any) -> bytes:
    """Return JSON in UTF-8."""
    return JSON.encode(value).encode("utf-8", "replace")


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits that are the same for the same JSON value only."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def milliseconds() -> int:
    """Return the time in milliseconds, as Mattermost writes it."""
    return int(time.time() * 1000)


def ephemeral(text: str) -> Json:
    """Return a response that only the person who typed the command sees."""
    # Without skip_slack_parsing, a typed <!channel> would become a mention.
    return {"response_type": "ephemeral", "text": text, "skip_slack_parsing": True}


def given_back(sentence: str, text: str) -> Json:
    """Return an ephemeral response: a sentence, and the typed text in a code block."""
    return ephemeral(f"{sentence}\n{WHAT_YOU_TYPED}\n{code_block(text)}" if text else sentence)


# What we ask

USER_AGENT = "Mattermost-Ticket"  # bot lists refuse Python-urllib
ANSWER_BYTES = 2**20  # of an answer that are read
LIST_BYTES = 16 * 2**20  # of a list of posts
POSTS = 1000  # that Mattermost lists at most
ERROR_ID_RE = re.compile(r"[a-z0-9_.]{1,100}")
PROXY_LOGIN = "Proxy-authorization"  # as urllib writes this header
HOPELESS = {  # OpenSSL's words for what does not pass, and what an admin can do
    "CERTIFICATE_VERIFY_FAILED": "SSL_CERT_FILE names the CAs to trust",
    "WRONG_VERSION_NUMBER": "no TLS is spoken there: is it http://?"}
TUNNEL_REFUSED_RE = re.compile(r"Tunnel connection failed: (\d{3})")  # by a proxy, says http.client
NO_API = "api.context.404.app_error"  # an address of Mattermost's, but none of its API
# Mattermost's names for errors, as far as they mean something here.
MEANINGS = {
    "api.channel.add_user_to_channel.type.app_error": "not to be joined",  # direct, group
    "api.post.create_post.can_not_post_to_deleted.error": "archived",
    "api.post.patch_post.can_not_update_post_in_deleted.error": "archived",
    "api.post.update_post.can_not_update_post_in_deleted.error": "archived",
    "api.post.update_post.permissions_time_limit.app_error": "too old to edit",
    "app.channel.get_member.missing.app_error": "no member",
    "api.user.check_user_mfa.bad_code.app_error": "code wanted",
    "interactive_message.decode_trigger_id.expired": "too late",
    "mfa.validate_token.authenticate.app_error": "code wanted",
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
    | whoever it is                    | more bytes than we read   | yes      | yes             |
    | whoever it is                    | 408, 429                  | yes      | no              |
    | whoever it is                    | 5xx                       | yes      | yes             |
    | Mattermost: its errors have IDs  | 4xx                       | no       | no              |
    | something else: `is_foreign`     | 3xx, 4xx                  | no       | no              |
    | something else: `is_foreign`     | 2xx                       | no       | yes             |

    `status` is None if there was no answer; `meaning` is one of MEANINGS, or "". `words` are
    Mattermost's own, where they may be shown.
    """

    def __init__(self, reason: str, status: int | None = None, *, error_id: str = "",
                 words: str = "", hint: str = "", retry_after: float | None = None,
                 is_connected: bool = True, is_hopeless: bool = False) -> None:
        self.status, self.meaning = status, MEANINGS.get(error_id, "")
        self.words, self.retry_after = words, retry_after  # one line; seconds
        self.by_mattermost = bool(error_id)
        if status is None:
            self.may_pass, self.may_have_worked = not is_hopeless, is_connected
        else:
            self.may_pass = status in (408, 429) or status >= 500
            self.may_have_worked = is_connected and (status < 300 or status >= 500)
        self.is_foreign = not (status is None or self.may_pass or self.by_mattermost)
        if self.is_foreign and is_connected:
            reason += f", but not as Mattermost does: {hint or 'is MATTERMOST_URL right?'}"
        super().__init__(f"{reason}: {words}" if words else reason)

    @property
    def is_too_long(self) -> bool:
        """Return whether a post has more characters or bytes than Mattermost takes."""
        return self.meaning == "too long" or self.status == 413

    @property
    def is_edit_refused(self) -> bool:
        """Return whether the bot may not edit a post of its own, or not for so long.

        What stands in between may let no PUT through.
        """
        return self.meaning == "too old to edit" or (
            self.status == 403 if self.by_mattermost else self.is_foreign)


class NotAllowed(MattermostError):
    """A call about something that is not there for the bot: Mattermost says 400, 403 or 404."""


class AnswerTooLong(MattermostError):
    """A call whose answer has more bytes than we read."""


class NotConnected(OSError):
    """There was no connection, for the reason that is its argument: so nothing was asked."""


def unanswered_call(error: Exception, peer: str) -> MattermostError:
    """Return the error of a call without an answer; `peer` says who was asked, for the log."""
    is_connected = not isinstance(error, NotConnected)
    cause = error if is_connected else error.args[0]
    refused = TUNNEL_REFUSED_RE.search(str(cause))
    hint = next((hint for words, hint in HOPELESS.items() if words in str(cause)), "")
    return MattermostError(
        f"no answer of {peer}: {cause!r:.300}{hint and ': '}{hint}",
        int(refused[1]) if refused else None, is_connected=is_connected, is_hopeless=bool(hint))


def redirected_to(location: str | None, url: str) -> str:
    """Return the URL that a redirect leads to from another one, without what may be secret.

    "" if it leads nowhere, or back to where it was asked for.
    """
    try:
        target = urllib.parse.urlsplit(urllib.parse.urljoin(url, location or ""))
    except ValueError:  # it is no URL
        return ""
    host = target.netloc.rpartition("@")[2]  # without user name and password
    found = f"{target.scheme}://{host}{target.path}"
    return "" if found == url.partition("?")[0] else one_line(found)


def refused_call(response: Response, url: str, peer: str) -> MattermostError:
    """Return the error in a response; `peer` says who was asked, for the log."""
    error_id, words = "", ""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        fields = foreign_json(response.body)
        error_id, words = fields["id"], fields.get("message")
    if error_id == NO_API or not isinstance(error_id, str):
        error_id = ""
    reason = f"{peer} answered {response.status}"
    if ERROR_ID_RE.fullmatch(error_id):  # plugins put their own words there
        reason += f" {error_id}"
    # The URL of a response hook is a secret, which an answer may repeat: so Mattermost's words are
    # kept for posts only, and where a redirect leads, for the API only.
    words = one_line(words) if url.endswith("/api/v4/posts") and isinstance(words, str) else ""
    target = redirected_to(response.headers.get("Location"), url) if "/api/v4/" in url else ""
    wait = response.headers.get("Retry-After", "")
    kind = NotAllowed if error_id and response.status in (400, 403, 404) else MattermostError
    return kind(
        reason, response.status, error_id=error_id, words=words,
        hint=f"it leads to {target}" if target and 300 <= response.status < 400 else "",
        retry_after=float(wait) if re.fullmatch("[0-9]+", wait) else None)  # it may be a date


class Call(urllib.request.Request):
    """A request to Mattermost."""

    most_bytes: int  # of its response
    may_repeat: bool  # whether it may be sent twice


class Response(NamedTuple):
    """What a call was answered with, read to its end."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @classmethod
    def whole(cls, response: http.client.HTTPResponse, most_bytes: int) -> Response:
        """Read a response; raise if it is cut short, or too long."""
        with response:
            body = response.read(most_bytes + 1)
        if len(body) > most_bytes:
            raise AnswerTooLong(f"the answer has more than {most_bytes} bytes")
        if response.length:  # bytes that are still owed: read() with a size does not tell
            raise http.client.IncompleteRead(body, response.length)
        return cls(response.status, response.headers, body)


class KeptConnections(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens the URLs of one host, http or https, on connections that are kept for the next call.

    A new TLS connection costs more time than all else in a call. When a kept one dies, its request
    may have arrived all the same. Nearly all of ours may be sent again at once: a GET, a dialog, a
    patch, and what only one person sees. But a Mattermost that has just been restarted knows no
    pending_post_id any more, and would make a post twice.
    """

    most, longest = 64, 10  # idle connections, and for how many seconds they are kept

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self.unused: collections.deque[tuple[http.client.HTTPConnection, float]] = (
            collections.deque())

    def do_open(self, http_class: Any, req: Any, **http_conn_args: Any) -> Any:
        """Return the response, read to its end; urllib's own do_open() leaves that to others."""
        headers, for_proxy = dict(req.header_items()), {}
        host = urllib.parse.urlsplit(req.full_url).netloc
        # ProxyHandler puts a proxy into req.host; has_proxy() is true only if the URL is http.
        is_through_tunnel = req.host != host and not req.has_proxy()
        if is_through_tunnel and PROXY_LOGIN in headers:
            for_proxy[PROXY_LOGIN] = headers.pop(PROXY_LOGIN)
        if kept := self.reusable():
            try:
                return self.exchange(kept, req, headers)
            except TimeoutError:
                self.close()  # the others may be as dead
                raise
            except (OSError, http.client.HTTPException):
                if not req.may_repeat:
                    raise
        connection = http_class(req.host, timeout=req.timeout, **http_conn_args)
        if is_through_tunnel:
            connection.set_tunnel(host, headers=for_proxy)
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NotConnected(error) from error
        return self.exchange(connection, req, headers)

    def exchange(self, connection: http.client.HTTPConnection, request: Call,
                 headers: dict[str, str]) -> Response:
        """Send a request, return its response, and keep the connection if the other side does."""
        try:
            connection.sock.settimeout(request.timeout)
            connection.request(
                request.get_method(), request.selector, request.data, headers)
            response = Response.whole(connection.getresponse(), request.most_bytes)
        except BaseException:
            connection.close()
            raise
        if connection.sock:  # http.client has dropped it if the response said Connection: close
            self.keep(connection)
        return response

    def keep(self, connection: http.client.HTTPConnection) -> None:
        """Keep an idle connection for the next call; close those that were kept for long."""
        now = time.monotonic()
        self.unused.append((connection, now))
        with contextlib.suppress(IndexError):  # another thread was faster
            while len(self.unused) > self.most or now - self.unused[0][1] > self.longest:
                self.unused.popleft()[0].close()

    def reusable(self) -> http.client.HTTPConnection | None:
        """Return the connection that was used last and is still good, or None."""
        with contextlib.suppress(IndexError):  # none is left
            while True:
                connection, since = self.unused.pop()
                poll = select.poll()
                poll.register(connection.sock, select.POLLIN)
                # What can be read before we asked can only be the end.
                if time.monotonic() - since < self.longest and not poll.poll(0):
                    return connection
                connection.close()
        return None

    def close(self) -> None:
        """Close all unused connections."""
        with contextlib.suppress(IndexError):
            while True:
                self.unused.pop()[0].close()


class Client:
    """Makes calls: JSON in, JSON out. Every method may raise MattermostError.

    A call that was surely not made is made again, within the patience of whoever asks.
    """

    timeout = 5  # seconds, for each step of a call: connect, send, wait, read
    pause = 1.0  # second before the second try; each is twice as long, up to two seconds
    patience = 20  # seconds in which calls are made again, inside retrying()
    patience_before_form = 5  # the same, until a form has opened
    # Seconds for a whole call of --check and the like, by alarm(); 0, no limit, in the service: its
    # server answers in time without one (Server.answer_within).
    command_waits = 0.0

    def __init__(self, url: str, token: str, tls: ssl.SSLContext | None) -> None:
        self.url = url
        self.headers = {"Content-Type": "application/json", "User-Agent": USER_AGENT,
                        **({"Authorization": f"Bearer {token}"} if token else {})}
        parts = urllib.parse.urlsplit(url)
        proxy = urllib.request.getproxies().get(parts.scheme, "").strip()
        if proxy and urllib.request.proxy_bypass(parts.netloc):
            proxy = ""
        self.peer = parts.netloc  # who is asked, for the log
        if proxy:
            host = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}").netloc
            host = host.rpartition("@")[2]  # without name and password
            self.peer += f" (through the proxy {host}: is NO_PROXY meant?)"
        # With context=None, urllib would load all CA certificates even for http.
        self.connections = KeptConnections(tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        # Bare: urllib's usual opener follows redirects, to any host and with our token.
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(self.connections)
        if proxy:
            self.opener.add_handler(urllib.request.ProxyHandler())
        self.of_thread = threading.local()

    @contextlib.contextmanager
    def retrying(self, seconds: float | None = None) -> Iterator[None]:
        """Let the calls of this thread be made again for some seconds; outside, they are not."""
        before = getattr(self.of_thread, "retries_end", 0)
        seconds = self.patience if seconds is None else seconds
        self.of_thread.retries_end = time.monotonic() + seconds
        try:
            yield
        finally:
            self.of_thread.retries_end = before

    def waited(self, seconds: float) -> bool:
        """Sleep and return True; return False at once if patience ends before."""
        if time.monotonic() + seconds > getattr(self.of_thread, "retries_end", 0):
            return False
        time.sleep(seconds)
        return True

    def retried(self, work: Callable[[], T], may_retry: Callable[[MattermostError], bool] = (
            lambda error: error.may_pass)) -> T:
        """Return the result of work(); while Mattermost is away, call it again and again.

        send() makes a call again only if it was surely not made. This is for what does no harm if
        it is made twice, as reading.
        """
        pause = self.pause
        while True:
            try:
                return work()
            except MattermostError as error:
                if not may_retry(error) or not self.waited(error.retry_after or pause):
                    raise
            pause = min(2 * pause, 2 * self.pause)

    def send(self, method: str, path: str, payload: Any = None, most_bytes: int = ANSWER_BYTES
             ) -> Response:
        """Return a response that means success."""
        data = None if payload is None else json_bytes(payload)
        return self.retried(lambda: self.send_once(method, path, data, most_bytes),
                            lambda error: error.may_pass and not error.may_have_worked)

    def send_once(self, method: str, path: str, data: bytes | None, most_bytes: int) -> Response:
        """Return a response that means success."""
        request = Call(self.url + path, data, self.headers, method=method)
        request.most_bytes, request.may_repeat = most_bytes, path != "/api/v4/posts"
        try:
            with alarm(self.command_waits):
                response: Response = self.opener.open(request, timeout=self.timeout)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise unanswered_call(error, self.peer) from error
        if response.status not in (200, 201):
            raise refused_call(response, request.full_url, self.peer)
        return response

    def call(self, method: str, path: str, payload: Any = None) -> Json:
        """Return the JSON object in an answer that means success."""
        return self.read(self.send(method, "/api/v4" + path, payload), dict)

    def call_for_list(self, method: str, path: str, payload: Any = None) -> list[Json]:
        """Return the JSON objects in an answer that means success, and is a list."""
        return objects(self.read(
            self.send(method, "/api/v4" + path, payload, LIST_BYTES), list))

    def read(self, response: Response, kind: type[T]) -> T:
        """Return the JSON in a response, of the kind that Mattermost gives here."""
        with contextlib.suppress(ValueError):
            answer = foreign_json(response.body)
            if isinstance(answer, kind):
                return answer
        raise self.odd_answer()

    def call_for_id(self, method: str, path: str, payload: Any = None) -> Json:
        """Return the JSON object in an answer that means success, if it has an ID."""
        answer = self.call(method, path, payload)
        if not matching(ID_RE, answer.get("id")):
            raise self.odd_answer()
        return answer

    def odd_answer(self) -> MattermostError:
        """Return the error for an answer that means success, but that Mattermost would not give."""
        return MattermostError(f"{self.peer} answered", 200)


class Mattermost(Client):
    """The part of the API that we use, as the bot. Every method may raise MattermostError.

    https://developers.mattermost.com/api-documentation/
    """

    config_is_kept = 60  # seconds

    def __init__(self, url: str, token: str, tls: ssl.SSLContext | None) -> None:
        super().__init__(url, token, tls)
        self.kept_config: tuple[float, Json] = (0, {})
        self.kept_bot_id = ""

    def get_client_config(self) -> Json:
        """Return the public configuration: `Version`, `SiteURL`, …, all of them texts."""
        config = self.call("GET", "/config/client?format=old")
        if not isinstance(config.get("Version"), str):
            raise self.odd_answer()
        self.kept_config = time.monotonic(), config
        return config

    def recent_config(self) -> Json:
        """Return the public configuration as it was a minute ago at most."""
        since, config = self.kept_config
        is_recent = config and time.monotonic() - since < self.config_is_kept
        return config if is_recent else self.get_client_config()

    def link(self, post_id: str) -> str:
        """Return the address of a post, for people; raise nothing."""
        try:
            config = self.recent_config()
        except MattermostError as error:
            log.warning("the site URL is not known: %s", error)
            config = self.kept_config[1]
        site_url = str(config.get("SiteURL")).rstrip("/")
        return f"{site_url if site_url.startswith('http') else self.url}/_redirect/pl/{post_id}"

    def max_post_size(self) -> int:
        """Return how many characters a message may have."""
        size = str(self.recent_config().get("MaxPostSize"))
        return max(int(size) if re.fullmatch("[0-9]{1,9}", size) else 0, MAX_POST_SIZE)

    def get_me(self) -> Json:
        """Return the bot's user: `id`, `username`, `roles`, `is_bot`, …"""
        return self.call_for_id("GET", "/users/me")

    def bot_id(self) -> str:
        """Return the bot's ID, which does not change while we run."""
        self.kept_bot_id = self.kept_bot_id or self.get_me()["id"]
        return self.kept_bot_id

    def get_user(self, user_id: str) -> Json:
        """Return a user: `username`, …"""
        return self.call_for_id("GET", f"/users/{user_id}")

    def get_user_by_username(self, user_name: str) -> Json:
        """Return a user: `id`, …"""
        return self.call_for_id("GET", f"/users/username/{user_name}")

    def get_my_teams(self) -> list[Json]:
        """Return the bot's teams: `id`, `name`, …"""
        return self.call_for_list("GET", "/users/me/teams")

    def get_my_channels(self, team_id: str) -> list[Json]:
        """Return the bot's channels of a team, archived ones, too: `id`, `name`, `delete_at`, …"""
        try:
            return self.call_for_list(
                "GET", f"/users/me/teams/{team_id}/channels?include_deleted=true")
        except NotAllowed as error:
            if error.status != 404:  # that is Mattermost's way to say that there are none
                raise
            return []

    def get_channel(self, channel_id: str) -> Json:
        """Return a channel: `type` (O, P, D, G), `name`, …; public, or one the bot is in."""
        return self.call("GET", f"/channels/{channel_id}")

    def get_channel_member(self, channel_id: str, user_id: str = "me") -> Json:
        """Return a membership; 404 if there is none, 403 for all if the bot has none."""
        return self.call("GET", f"/channels/{channel_id}/members/{user_id}")

    def add_channel_member(self, channel_id: str, user_id: str) -> Json:
        """Let the bot join: 201 for public channels of its teams."""
        return self.call("POST", f"/channels/{channel_id}/members", {"user_id": user_id})

    def get_my_team_member(self, team_id: str) -> Json:
        """Return the bot's membership in a team: `roles`, …"""
        return self.call("GET", f"/teams/{team_id}/members/me")

    def get_roles_by_names(self, names: list[str]) -> list[Json]:
        """Return roles: `name`, `permissions`, …; an error if Mattermost knows none of them."""
        return self.call_for_list("POST", "/roles/names", names)

    def get_posts(self, path: str) -> list[Json]:
        """Return the posts of a list of Mattermost's, in its order."""
        answer = self.read(self.send("GET", "/api/v4" + path, None, LIST_BYTES), dict)
        posts, order = answer.get("posts"), answer.get("order")
        if not isinstance(posts, dict) or not isinstance(order, list):
            raise self.odd_answer()
        return objects(posts.get(one) for one in order if isinstance(one, str))

    def get_channel_posts(self, channel_id: str, since: int) -> list[Json]:
        """Return posts of a channel since a time in milliseconds, replies too; POSTS at most."""
        return self.get_posts(f"/channels/{channel_id}/posts?since={since}")

    def get_root_posts(self, channel_id: str, before: str, number: int) -> list[Json]:
        """Return root posts of a channel, the newest first, before one: `last_reply_at`, …"""
        before = f"&before={before}" if before else ""
        return self.get_posts(
            f"/channels/{channel_id}/posts?collapsedThreads=true&per_page={number}{before}")

    def get_post_thread(self, post_id: str) -> list[Json]:
        """Return the posts of a thread."""
        return self.get_posts(f"/posts/{post_id}/thread")

    def get_post(self, post_id: str) -> Json:
        """Return a post: `user_id`, `message`, `props`, …; without what its buttons carry."""
        return self.call_for_id("GET", f"/posts/{post_id}")

    def create_post(self, post: Json) -> Json:
        """Return a post as it has been made: `id`, `props`, …"""
        return self.call_for_id("POST", "/posts", post)

    def patch_post(self, post_id: str, patch: Json) -> Json:
        """Patch a post of the bot's own, and return it; `props` are replaced as a whole."""
        return self.call_for_id("PUT", f"/posts/{post_id}/patch", patch)

    def create_ephemeral_post(self, user_id: str, channel_id: str, message: str) -> None:
        """Show a message to one person; only privileged bots may."""
        post = {"channel_id": channel_id, "message": message}
        self.call("POST", "/posts/ephemeral", {"user_id": user_id, "post": post})

    def open_dialog(self, trigger_id: str, url: str, dialog: Json) -> None:
        """Open a dialog for the person whose command or press the trigger belongs to."""
        opening = {"trigger_id": trigger_id, "url": url, "dialog": dialog}
        self.call("POST", "/actions/dialogs/open", opening)

    def answer_command(self, hook: str, response: Json) -> None:
        """Answer a slash command later: Mattermost lets us five times, within half an hour.

        If nobody knows whether that has worked, it is done once more: twice is better than never.
        """
        try:
            self.send("POST", f"/hooks/commands/{hook}", response)
        except MattermostError as error:
            if not error.may_have_worked:
                raise
            self.send("POST", f"/hooks/commands/{hook}", response)


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after some seconds, in the main thread; 0 for never."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def objects(values: Iterable[Any]) -> list[Json]:
    """Return those of some values that are JSON objects."""
    return [value for value in values if isinstance(value, dict)]


# Where the bot may post, and who is who

REMEMBERED = 10_000  # of each: channels, dialogs, tickets


class Recent(dict[str, T]):
    """A dictionary of REMEMBERED entries at most: what get_or_add() had last goes last."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def get_or_add(self, key: str, value: T) -> T:
        """Add a value, unless the key has one; return the key's value."""
        with self.lock:
            value = self.pop(key, value)
            self[key] = value  # at the end
            if len(self) > REMEMBERED:
                del self[next(iter(self))]
            return value

    def forget(self, key: str) -> None:
        """Drop a key, if it is there."""
        with self.lock:
            self.pop(key, None)


class Channels:
    """Where the bot may post: finds out, joins where it must, and remembers the good ones."""

    def __init__(self, mattermost: Mattermost, settings: Settings) -> None:
        self.mattermost, self.settings = mattermost, settings
        self.good: Recent[bool] = Recent()

    def usual_channel(self, channel_id: str) -> str:
        """Return the channel of a ticket that no option sends elsewhere."""
        return self.settings.ticket_channel or channel_id

    def ensure_can_post(self, channel_id: str, asked_in: str, team_id: str = "") -> None:
        """Raise Problem if the bot can't post in a channel.

        `asked_in` is where the person is, this channel or another one; `team_id` is its team, if
        that is known. A channel that Mattermost says nothing about is good until it refuses a post.
        """
        if channel_id in self.good:
            return
        try:
            me = self.mattermost.get_me()
            obstacle = self.join_or_obstacle(
                channel_id, me, team_id if channel_id == asked_in else "")
        except MattermostError as error:
            if error.status == 401 and error.by_mattermost:
                raise Problem(BAD_TOKEN, log=error) from error
            log.warning("channel=%s could not be looked at: %s", channel_id, error)
            return
        if obstacle:
            raise self.problem(obstacle, channel_id, asked_in, me)
        self.good.get_or_add(channel_id, True)

    def problem(self, obstacle: str, channel_id: str, asked_in: str, me: Json) -> Problem:
        """Return the Problem for a key of CANT_POST."""
        bot = matching(USER_NAME_RE, me.get("username"))
        sentence = CANT_POST[obstacle].person if channel_id == asked_in else CANT_POST_ELSEWHERE
        return Problem(sentence.format(bot=bot), log=self.for_admin(obstacle, channel_id, bot))

    def for_admin(self, obstacle: str, channel_id: str, bot: str) -> str:
        """Return the admin's sentence for a key of CANT_POST, with the channel in front."""
        why = CANT_POST[obstacle].admin.format(bot=bot)
        return f"{self.name_for_admin(channel_id)}: {why}"

    def name_for_admin(self, channel_id: str) -> str:
        """Return what to call a channel: by the setting that names it, and its ID."""
        if channel_id == self.settings.ticket_channel:
            return f"TICKET_CHANNEL: {channel_id}"
        if channel_id in self.settings.form.channels:
            return f"{self.settings.form.source}: channel {channel_id}"
        return f"channel {channel_id}"

    def join_or_obstacle(self, channel_id: str, me: Json, team_id: str = "") -> str:
        """Join a channel if need be; return a key of CANT_POST if the bot can't post there, or "".
        """
        channel: Json = {}
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
        is_public = channel.get("type") == "O"
        try:
            member = self.joined_member(channel_id, me["id"])
        except NotAllowed as error:
            roles = str(me.get("roles")).split()
            if "system_post_all" in roles or (is_public and "system_post_all_public" in roles):
                return ""
            if error.meaning == "not to be joined":
                return "direct"
            return "not a member" if self.is_in_team(team_id) else "not in the team"
        return "" if self.may_post(channel, member, me) else "read only"

    def is_in_team(self, team_id: str) -> bool:
        """Return whether the bot is in a team; True if that is not known."""
        with contextlib.suppress(MattermostError):
            return not team_id or any(
                team.get("id") == team_id for team in self.mattermost.get_my_teams())
        return True

    def joined_member(self, channel_id: str, bot_id: str) -> Json:
        """Return the bot's membership in a channel, a new one if need be."""
        with contextlib.suppress(NotAllowed):
            return self.mattermost.get_channel_member(channel_id)
        return self.mattermost.add_channel_member(channel_id, bot_id)

    def may_post(self, channel: Json, member: Json, me: Json) -> bool:
        """Return whether a role lets the bot post; True if roles can't be read."""
        needed = {"create_post", "create_post_public"} if channel.get("type") == "O" else {
            "create_post"}
        try:
            memberships = [me, member]
            if team_id := matching(ID_RE, channel.get("team_id")):  # a group message has none
                memberships.append(self.mattermost.get_my_team_member(team_id))
            if not all(membership["roles"] for membership in memberships):  # these tell nothing
                return True
            names = " ".join(membership["roles"] for membership in memberships).split()
            known = {role["name"]: role["permissions"]
                     for role in self.mattermost.get_roles_by_names(names)}
            return any(needed.intersection(known[name]) for name in names)  # or KeyError
        except (MattermostError, LookupError, TypeError, AttributeError):
            return True

    def create_post(self, post: Json, asked_in: str, team_id: str = "") -> Json:
        """Return a post as it has been made; where the bot is no longer a member, join first.

        `asked_in` is the channel where somebody asked for it, `team_id` its team, if it is known.
        """
        channel_id = post["channel_id"]
        for is_last in (False, True):
            try:
                return self.mattermost.create_post(post)
            except NotAllowed as error:
                self.good.forget(channel_id)
                obstacle = "read only" if is_last and error.status == 403 else ""
                if error.meaning == "archived":
                    obstacle = "archived"
                if obstacle:
                    me = self.mattermost.get_me()
                    raise self.problem(obstacle, channel_id, asked_in, me) from error
                if error.status != 403:
                    raise
            self.ensure_can_post(channel_id, asked_in, team_id)
        raise AssertionError("the second try has returned or raised")

    def reply(self, channel_id: str, root_id: str, message: str, pending_id: str = "",
              **props: Any) -> None:
        """Post in a thread; with the same pending_id, it is posted once."""
        post = new_post(
            channel_id, message, pending_id or secrets.token_urlsafe(24), root_id, **props)
        self.mattermost.retried(lambda: self.create_post(post, channel_id))


class Name(NamedTuple):
    """What a person or a channel is called, and how a ticket shows it."""

    name: str
    markdown: str
    is_person: bool


Names = dict[str, Name]  # by ID


class Directory:
    """Looks up the names of people and channels, and who is in a channel."""

    def __init__(self, mattermost: Mattermost) -> None:
        self.mattermost = mattermost

    def names(self, answered: list[tuple[Element, Any]], channel_id: str,
              before: dict[str, str] | None = None) -> Names:
        """Return a Name for each ID in answers; raise FieldProblems where the bot sees nothing.

        `channel_id` says where the ticket goes, `before` what those were called that it had before:
        these may stay, whether they can still be seen or not.
        """
        names: Names = {}
        errors = {}
        find = functools.cache(self.find)  # so that each is asked for once
        for element, answer in answered:
            if not (ids := element.ids(answer)):
                continue
            is_channel = element.data_source == "channels"
            team_id = matching(ID_RE, find("channels", channel_id).get("team_id")) if (
                is_channel) else ""
            for one in ids:
                name = element.name_of(find(element.data_source, one), team_id)
                if not name and before and one in before:
                    name = Name(before[one], inline_code(untagged(before[one])), is_person=False)
                if not name:
                    bot = matching(USER_NAME_RE, self.mattermost.get_me().get("username"))
                    errors[element.name] = element.not_seen.format(bot=bot)
                    break
                names[one] = name
        if errors:
            raise FieldProblems(errors)
        return names

    def find(self, data_source: str, one: str) -> Json:
        """Return the user or channel of an ID, {} if the bot can't see it."""
        get = {"users": self.mattermost.get_user, "channels": self.mattermost.get_channel}
        with contextlib.suppress(NotAllowed):
            return self.mattermost.retried(lambda: get[data_source](one))
        return {}

    def taker(self, user_id: str) -> User:
        """Return who was chosen in a menu; raise Problem if they can't have a ticket."""
        user = self.find("users", user_id) if user_id else {}
        name = matching(USER_NAME_RE, user.get("username"))
        if not name:
            raise Problem(NOBODY)
        if user.get("is_bot"):
            raise Problem(NOT_TO_A_BOT.format(user_name=name))
        if user.get("delete_at"):
            raise Problem(HAS_LEFT.format(user_name=name))
        return User(user_id, name)

    def is_member(self, channel_id: str, user_id: str) -> bool:
        """Return whether somebody is in a channel."""
        try:
            self.mattermost.retried(
                lambda: self.mattermost.get_channel_member(channel_id, user_id))
        except NotAllowed as error:
            if error.meaning != "no member":
                raise
            return False
        return True

    def outside(self, channel_id: str, user_ids: list[str]) -> list[str]:
        """Return those of some users who are not in a channel; none, if the bot can't see that."""
        with contextlib.suppress(MattermostError):
            return [user_id for user_id in user_ids if not self.is_member(channel_id, user_id)]
        return []

    def people_outside(self, channel_id: str, names: Names) -> str:
        """Return the people in `names` who are not in a channel, as Markdown."""
        people = [one for one, name in names.items() if name.is_person]
        return ", ".join(names[one].markdown for one in self.outside(channel_id, people))


# ------------------------------------------------------------------------------ 5. The form's rules
#
# What each type of element means: how it is checked at start, prefilled, read from a submission,
# and shown in a ticket. It promises that whatever Mattermost would refuse is refused at start.

MAX_TEXT, MAX_TEXTAREA = 150, 50_000  # characters of an answer, if the form does not say it
MAX_BRIEF = 100  # characters of an answer in a reply about an Edit
MAX_CHOSEN = 50  # people or channels in an answer: each of them is looked up
JSON_TYPES = {str: "a text", bool: "true or false", int: "a whole number", list: "a list",
              dict: "a JSON object"}
REQUIRED_KEYS = ("title", "elements", "type", "name", "display_name", "text", "value")
FORM_KEYS: dict[str, type] = {
    "title": str, "submit_label": str, "introduction_text": str, "icon_url": str,
    "elements": list, "mention": str}
ELEMENT_KEYS: dict[str, type] = {
    "type": str, "name": str, "display_name": str, "help_text": str, "optional": bool,
    "default": str, "placeholder": str, "subtype": str, "min_length": int, "max_length": int,
    "data_source": str, "options": list, "multiselect": bool, "min_date": str, "max_date": str,
    "time_interval": int, "datetime_config": dict, "code": bool, "subject": bool}
OPTION_KEYS: dict[str, type] = {"text": str, "value": str, "mention": str, "channel": str}
DATETIME_KEYS: dict[str, type] = {
    "min_date": str, "max_date": str, "time_interval": int, "location_timezone": str,
    "manual_time_entry": bool, "allow_manual_time_entry": bool}
OUR_KEYS = ("mention", "channel", "code", "subject")
KEYS_NOT_TO_SET = ("state", "callback_id", "notify_on_cancel")
# Keys, types and data sources that Mattermost knows, and what to do instead.
UNSUPPORTED = {
    "dynamic": "let people choose from options, users or channels",
    "data_source_url": "let people choose from options, users or channels",
    "refresh": "show all elements from the beginning",
    "source_url": "show all elements from the beginning",
    "file": "people put files into the ticket's thread",
}
SUBTYPES = ("text", "email", "number", "tel", "url")
MENTION_RE = re.compile(r"@[\w.-]+", re.ASCII)
NUMBER_RE = re.compile(r"[+-]?(\d++(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)

Reading = tuple[Any, str]  # an answer or None, and what is wrong with it or ""


def without(thing: Json, keys: Iterable[str]) -> Json:
    """Return a JSON object without some of its keys."""
    return {key: value for key, value in thing.items() if key not in keys}


def sound_part(thing: Any, keys: dict[str, type], problems: list[str]) -> Json:
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


def value_problem(key: str, kind: type, value: Any) -> str:
    """Return the fault of a key's value, which must have a JSON type; "" if it has none."""
    if JSON_TYPES.get(type(value)) != JSON_TYPES[kind]:  # as type() says: a bool is no int
        return f"must be {JSON_TYPES[kind]}"
    if kind is int and not 0 < value < 2**31:
        return f"must be from 1 to {2**31 - 1}"
    if kind is str and key in REQUIRED_KEYS and not clean(value):
        return "is blank"
    if key == "mention" and not MENTION_RE.fullmatch(value):
        return "must look like @team-or-user"
    if key == "channel" and not CHOSEN_ID_RE.fullmatch(value):
        return "must be a channel's ID (26 letters and digits), not its name"
    return ""


def utc_now() -> datetime.datetime:
    """Return the current time in UTC."""
    return datetime.datetime.now(datetime.UTC)


def in_utc(moment: datetime.datetime) -> str:
    """Return a time as Mattermost's clients write it: 2026-11-29T10:00:00Z."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def listed(answer: Any) -> list[Any]:
    """Return an answer as a list, also where only one can be chosen."""
    return answer if isinstance(answer, list) else [answer]


class Element:
    """A field of the form. What a type of Mattermost's means is all in a subclass.

    `problems` says what is wrong with it.
    """

    is_block = False  # whether an answer has lines of its own in a ticket
    json_type: type = str  # of an answer
    when_empty = ""  # what is meant by an answer without anything in it
    invalid = NOT_TEXT  # what is said of a value that can't be an answer
    data_source = not_seen = ""  # of a choice of people or channels
    can_be_several = False
    our_keys: tuple[str, ...] = ()  # of OUR_KEYS, those that this type knows

    def __init__(self, element: Any) -> None:
        self.problems: list[str] = []
        self.raw = sound_part(element, ELEMENT_KEYS, self.problems)
        self.problems += [f"{key} is not for a {self.raw.get('type')}" for key in OUR_KEYS
                          if key in self.raw and key not in self.our_keys]
        self.name: str = self.raw.get("name", "")
        label = untagged(one_line(self.raw.get("display_name", "")))
        self.label = f"**{label}**" if label.endswith(("?", ":", "!")) else f"**{label}:**"
        self.is_optional = bool(self.raw.get("optional"))
        self.is_several = self.can_be_several and bool(self.raw.get("multiselect"))
        self.options: dict[str, Json] = {}  # by value; blanks are no part of it here
        for number, option in enumerate(self.raw.get("options", []), 1):
            problems: list[str] = []
            option = sound_part(option, OPTION_KEYS, problems)
            value = clean(option.get("value", ""))
            if value and value in self.options:
                problems.append("another one has the same value")
            if self.is_several and "," in value:
                problems.append("value must have no comma: a phone sends several with commas")
            self.options[value] = option
            self.problems += [f"option {number}: {problem}" for problem in problems]

    def default_problem(self, default: str) -> str:
        """Return the fault of a default; "" if it has none."""
        return self.read_text(default, utc_now())[1]

    def notes(self) -> Iterator[str]:
        """Yield a note for each thing that Mattermost takes, but does not do well."""
        yield from ()

    def needs(self) -> Iterator[tuple[str, str, tuple[int, int], str]]:
        """Yield what an older Mattermost lacks: a level, what it is, the version, and a remark.

        A "problem" is something that people can't use there.
        """
        yield from ()

    def for_mattermost(self) -> Json:
        """Return the element as Mattermost gets it when the form opens."""
        options = [without(option, OUR_KEYS) for option in self.options.values()]
        return {**without(self.raw, OUR_KEYS), **({"options": options} if options else {})}

    def filled(self, answer: Any, names: dict[str, str]) -> Json:
        """Return it with an answer (None for none) as its default; `names` has those of IDs."""
        empty = without(self.for_mattermost(), ["default"])
        return empty if answer is None else {**empty, "default": ",".join(listed(answer))}

    def fits(self, answer: Any) -> bool:
        """Return whether an answer, perhaps to another form, can be one to this element."""
        return isinstance(answer, self.json_type)

    def read(self, value: Any, opened: datetime.datetime) -> Reading:
        """Return the answer in a submitted value, and what is wrong with it.

        `opened` is when the form was: a relative date counts from there, so that a form that is
        submitted twice means the same. Clients leave out what was not touched, or send null or "";
        a number may come as a text.
        """
        if isinstance(value, (list, dict)):
            return None, self.invalid
        if not isinstance(value, str):
            value = "" if value is None else json.dumps(value)
        text = clean(value) or self.when_empty
        return self.read_text(text, opened) if text else self.no_answer()

    def no_answer(self) -> Reading:
        """Return the Reading of an empty value."""
        return None, "" if self.is_optional else REQUIRED

    def read_text(self, text: str, opened: datetime.datetime) -> Reading:
        """Return the Reading of a text that is not empty."""
        raise NotImplementedError

    def ids(self, answer: Any) -> list[str]:
        """Return the IDs in an answer for which its Markdown needs a Name."""
        return []

    def name_of(self, found: Json, team_id: str) -> Name | None:
        """Return the Name of a user or channel, in a ticket of a team; None if it has none."""
        raise NotImplementedError

    def is_shown(self, answer: Any) -> bool:
        """Return whether a ticket shows an answer: not a box that is optional and not ticked."""
        return True

    def words(self, answer: Any, names: dict[str, str]) -> str:
        """Return an answer in words; `names` has what the IDs in it are called."""
        return str(answer)

    def brief(self, answer: Any, names: Names, mentions: dict[str, str]) -> str:
        """Return an answer in code, LONG_ANSWER if it is not short, and the new `mentions`."""
        words = self.words(answer, {one: name.name for one, name in names.items()})
        is_short = "\n" not in words and len(words) <= MAX_BRIEF
        return " ".join([inline_code(untagged(words)) if is_short else LONG_ANSWER,
                         *mentions.values()])

    def markdown(self, answer: Any, names: Names) -> str:
        """Return an answer as a ticket shows it, in Markdown."""
        return inline_code(untagged(answer))

    def mentions(self, answer: Any, names: Names) -> dict[str, str]:
        """Return the mentions in an answer as Markdown, by user ID or mention."""
        return {}


class Text(Element):
    """A line of text."""

    our_keys: tuple[str, ...] = ("subject",)
    longest = MAX_TEXT
    is_code = False

    def __init__(self, element: Any) -> None:
        super().__init__(element)
        self.subtype = self.raw.get("subtype", "text")
        self.least = self.raw.get("min_length", 0)
        # A default may be a template, longer than usual or shorter than min_length.
        self.most = self.raw.get("max_length") or max(
            self.longest, len(self.raw.get("default", "")))
        if self.subtype not in SUBTYPES:
            self.problems.append(f"subtype must be one of {', '.join(SUBTYPES)}")
        if self.least > self.most:
            self.problems.append(f"min_length must not be more than max_length, {self.most}")

    def default_problem(self, default: str) -> str:
        return self.kind_problem(default)

    def read_text(self, text: str, opened: datetime.datetime) -> Reading:
        if len(text) < self.least:
            return text, TOO_SHORT.format(limit=self.least)
        if len(text) > self.most:
            return text, TOO_LONG.format(limit=self.most, excess=len(text) - self.most)
        return text, self.kind_problem(text)

    def kind_problem(self, text: str) -> str:
        """Return the fault of a text of this subtype, as loosely as Mattermost finds it; or ""."""
        if self.subtype == "number" and not NUMBER_RE.fullmatch(text):
            return NOT_A_NUMBER
        if self.subtype == "email" and "@" not in text:
            return NOT_AN_EMAIL
        if self.subtype == "url" and not ("http://" in text or "https://" in text):
            return NOT_A_URL
        return ""

    def subject(self, answer: str) -> str:
        """Return the heading that an answer makes; "" if it has no letter and no digit."""
        return subject_of(answer, self.is_code)

    def is_said_by(self, subject: str, answer: str) -> bool:
        """Return whether a ticket's heading says an answer whole."""
        return not self.is_code and " ".join(answer.split()) == subject


class Textarea(Text):
    """Several lines: a ticket quotes them as Markdown, or shows them as typed, with `code`."""

    is_block = True
    our_keys = ("subject", "code")
    longest = MAX_TEXTAREA

    def __init__(self, element: Any) -> None:
        super().__init__(element)
        self.is_code = bool(self.raw.get("code"))

    def for_mattermost(self) -> Json:
        # Its clients cut what is pasted, without a word: at 3,000, if nothing is said.
        return {**super().for_mattermost(), "max_length": self.most}

    def markdown(self, answer: Any, names: Names) -> str:
        if self.is_code:
            return untagged(code_block(answer)) + "\n"
        return untagged(quotes_and_code(answer))


class Select(Element):
    """A choice of one thing, or of several with `multiselect`: of what, a subclass says."""

    can_be_several = True
    invalid = NOT_AN_OPTION

    def needs(self) -> Iterator[tuple[str, str, tuple[int, int], str]]:
        if self.is_several:
            yield "warning", "multiselect", (11, 0), ": with an older one, people choose one only"

    def fits(self, answer: Any) -> bool:
        return (self.is_several or isinstance(answer, str)) and all(
            isinstance(one, str) for one in listed(answer))

    def read(self, value: Any, opened: datetime.datetime) -> Reading:
        if not (self.is_several and isinstance(value, list)):
            return super().read(value, opened)
        parts = [clean(one) if isinstance(one, str) else one for one in value]
        return self.choose([self.option_for(one) if isinstance(one, str) else None
                            for one in parts if one not in (None, "")])

    def read_text(self, text: str, opened: datetime.datetime) -> Reading:
        if self.is_several:  # on a phone, it comes as a text with commas
            return self.choose([self.option_for(part)
                                for part in map(clean, text.split(",")) if part])
        chosen = self.option_for(text)
        return chosen, "" if chosen else self.invalid

    def choose(self, chosen: list[str | None]) -> Reading:
        """Return what was chosen, each once; None in it stands for something that is no option."""
        if None in chosen:
            return None, self.invalid
        return (list(dict.fromkeys(chosen)), "") if chosen else self.no_answer()

    def option_for(self, text: str) -> str | None:
        """Return the value or ID that a text stands for, or None."""
        raise NotImplementedError


class OptionSelect(Select):
    """A choice of options."""

    def __init__(self, element: Any) -> None:
        super().__init__(element)
        if not self.options:
            self.problems.append("options is missing")

    def filled(self, answer: Any, names: dict[str, str]) -> Json:
        known = [one for one in listed(answer) if clean(one) in self.options] if answer else []
        return super().filled(known or None, names)

    def option_for(self, text: str) -> str | None:
        return self.options.get(text, {}).get("value")

    def chosen(self, answer: Any) -> list[Json]:
        """Return the options in an answer; of one that is gone, its value as its text."""
        return [self.options.get(clean(one)) or {"text": one} for one in listed(answer)]

    def words(self, answer: Any, names: dict[str, str]) -> str:
        return ", ".join(clean(option["text"]) for option in self.chosen(answer))

    def markdown(self, answer: Any, names: Names) -> str:
        texts = ", ".join(inline_code(untagged(clean(option["text"])))
                          for option in self.chosen(answer))
        return " ".join([texts, *self.mentions(answer, names)])

    def mentions(self, answer: Any, names: Names) -> dict[str, str]:
        return {option["mention"]: option["mention"] for option in self.chosen(answer)
                if "mention" in option}


class Radio(OptionSelect):
    """A choice of one option, all of which are shown."""

    can_be_several = False

    def notes(self) -> Iterator[str]:
        if "default" in self.raw:
            yield "default: Mattermost 11 does not show it, but sends it"


class UserSelect(Select):
    """A choice of people, who are mentioned in the ticket."""

    data_source = "users"
    not_seen = PERSON_NOT_SEEN

    def filled(self, answer: Any, names: dict[str, str]) -> Json:
        # Mattermost shows no default of these: what is left empty stays as it is.
        shown = ", ".join(names.get(one, one) for one in self.ids(answer))
        stays = {"placeholder": shown, "optional": True} if shown else {}
        return {**super().filled(None, names), **stays}

    def fits(self, answer: Any) -> bool:
        return super().fits(answer) and all(map(self.option_for, listed(answer)))

    def option_for(self, text: str) -> str | None:
        return matching(CHOSEN_ID_RE, text) or None

    def choose(self, chosen: list[str | None]) -> Reading:
        answer, problem = super().choose(chosen)
        if answer and len(answer) > MAX_CHOSEN:
            return None, TOO_MANY.format(limit=MAX_CHOSEN)
        return answer, problem

    def ids(self, answer: Any) -> list[str]:
        return listed(answer) if answer else []

    def name_of(self, found: Json, team_id: str) -> Name | None:
        name = matching(USER_NAME_RE, found.get("username"))
        return Name(name, f"@{name}", is_person=True) if name else None

    def words(self, answer: Any, names: dict[str, str]) -> str:
        return ", ".join(names.get(one, one) for one in self.ids(answer))

    def markdown(self, answer: Any, names: Names) -> str:
        return ", ".join(names[one].markdown for one in self.ids(answer))

    def brief(self, answer: Any, names: Names, mentions: dict[str, str]) -> str:
        return ", ".join(mentions.get(one) or inline_code(untagged(names[one].name))
                         for one in self.ids(answer))

    def mentions(self, answer: Any, names: Names) -> dict[str, str]:
        # news() asks for the old answers, too: "" for who is in these only.
        return {one: names[one].markdown if one in names and names[one].is_person else ""
                for one in self.ids(answer)}


class ChannelSelect(UserSelect):
    """A choice of channels, to which the ticket leads."""

    data_source = "channels"
    not_seen = CHANNEL_NOT_SEEN

    def name_of(self, found: Json, team_id: str) -> Name | None:
        name = matching(CHANNEL_NAME_RE, found.get("name"))
        if not name or found.get("type") in ("D", "G"):  # direct and group messages
            return None
        if team_id and found.get("team_id") == team_id:
            return Name(name, f"~{name}", is_person=False)
        # With its name, ~ would lead into the ticket's own team.
        shown = one_line(str(found.get("display_name") or "")) or name
        return Name(shown, inline_code(untagged(shown)), is_person=False)


class Bool(Element):
    """A box to tick."""

    json_type = bool
    when_empty = "false"
    invalid = NOT_AN_OPTION

    def default_problem(self, default: str) -> str:
        return "" if default in ("true", "false") else 'must be "true" or "false"'

    def filled(self, answer: Any, names: dict[str, str]) -> Json:
        return super().filled("true" if answer else None, names)

    def read_text(self, text: str, opened: datetime.datetime) -> Reading:
        if text.lower() not in ("true", "false"):
            return None, self.invalid
        is_ticked = text.lower() == "true"
        return is_ticked, "" if is_ticked or self.is_optional else NOT_TICKED

    def is_shown(self, answer: Any) -> bool:
        return answer or not self.is_optional

    def words(self, answer: Any, names: dict[str, str]) -> str:
        return YES if answer else NO

    def markdown(self, answer: Any, names: Names) -> str:
        return inline_code(self.words(answer, {}))


DATE_RE = re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?)?", re.ASCII)
NEAR_DAYS = {"yesterday": -1, "today": 0, "tomorrow": 1}
FROM_NOW_RE = re.compile(r"([+-][0-9]{1,3})([dwmHMS])")  # +3d, -1w, +30M: Mattermost's own
UNITS = {"d": "days", "w": "weeks", "H": "hours", "M": "minutes", "S": "seconds"}  # of timedelta


def parse_day(text: str, now: datetime.datetime) -> datetime.date:
    """Return the day that a text means; raise ValueError if it means none."""
    if text in NEAR_DAYS:
        return now.date() + datetime.timedelta(days=NEAR_DAYS[text])
    if (from_now := FROM_NOW_RE.fullmatch(text)) and from_now[2] in "dw":
        return now.date() + datetime.timedelta(**{UNITS[from_now[2]]: int(from_now[1])})
    if from_now and from_now[2] == "m":
        years, month = divmod(now.month - 1 + int(from_now[1]), 12)
        year, month = now.year + years, month + 1
        return datetime.date(year, month, min(now.day, calendar.monthrange(year, month)[1]))
    return datetime.datetime.fromisoformat(text if DATE_RE.fullmatch(text) else "").date()


def parse_time(text: str, now: datetime.datetime) -> datetime.datetime:
    """Return the time that a text means, in UTC; raise ValueError if it means none."""
    if (from_now := FROM_NOW_RE.fullmatch(text)) and from_now[2] in "HMS":
        return now + datetime.timedelta(**{UNITS[from_now[2]]: int(from_now[1])})
    if DATE_RE.fullmatch(text):
        moment = datetime.datetime.fromisoformat(text)
    else:
        moment = datetime.datetime.combine(parse_day(text, now), datetime.time())
    if not moment.tzinfo:
        return moment.replace(tzinfo=datetime.UTC)
    try:
        return moment.astimezone(datetime.UTC)
    except OverflowError as error:
        raise ValueError("that is no year") from error


def time_of(text: str) -> datetime.datetime | None:
    """Return the time that a text means now, None if it means none."""
    with contextlib.suppress(ValueError, OverflowError):
        return parse_time(text, utc_now())
    return None


class Date(Element):
    """A day. An answer may be relative, too: a default that nobody touched comes as it is.

    min_date and max_date are left to Mattermost's clients: only they know what "today" is for a
    person.
    """

    invalid = NOT_A_DATE

    def __init__(self, element: Any) -> None:
        super().__init__(element)
        problems: list[str] = []
        self.config = sound_part(self.raw.get("datetime_config", {}), DATETIME_KEYS, problems)
        self.problems += [f"datetime_config: {problem}" for problem in problems]
        limits = {**self.config, **self.raw}
        self.first, self.last = limits.get("min_date", ""), limits.get("max_date", "")
        for key in ("min_date", "max_date"):
            for thing in (self.raw, self.config):
                if key in thing and not time_of(thing[key]):
                    self.problems.append(f"{key}: {thing[key]!r:.60} is no date")

        self.zone: datetime.tzinfo = datetime.UTC
        self.unknown_zone = ""
        # An image without tzdata, as Alpine's, knows no zone, and can say nothing of a name.
        if (zone := self.config.get("location_timezone")) and (
                known := {name.lower(): name for name in zoneinfo.available_timezones()}):
            if name := known.get(zone.lower()):
                self.zone = zoneinfo.ZoneInfo(name)
            else:
                self.unknown_zone = zone

    def is_outside(self, text: str) -> bool:
        """Return whether a day or time lies outside min_date and max_date."""
        moment, first, last = time_of(text), time_of(self.first), time_of(self.last)
        return bool(moment and (first and moment < first or last and moment > last))

    def notes(self) -> Iterator[str]:
        if self.is_outside(self.first):
            yield "min_date lies after max_date: people can choose nothing"
        elif self.is_outside(self.raw.get("default", "")):
            yield ("default lies outside min_date and max_date: Mattermost 11 refuses the form "
                   "until people change it")
        if self.unknown_zone:
            yield (f"location_timezone: there is no {self.unknown_zone!r:.60}: people's own zone "
                   "is taken instead")

    def filled(self, answer: Any, names: dict[str, str]) -> Json:
        filled = super().filled(answer, names)
        if self.is_outside(answer or ""):  # the day has passed: Mattermost 11 would refuse the form
            filled = without(filled, ("min_date", "max_date"))
            filled["datetime_config"] = without(self.config, ("min_date", "max_date"))
        return {key: value for key, value in filled.items() if value}

    def needs(self) -> Iterator[tuple[str, str, tuple[int, int], str]]:
        yield "problem", "a date", (11, 1), ": an older one does not show it"
        if self.config:
            yield "warning", "datetime_config", (11, 6), ""

    def fits(self, answer: Any) -> bool:
        return isinstance(answer, str) and not self.read_text(answer, utc_now())[1]

    def read_text(self, text: str, opened: datetime.datetime) -> Reading:
        try:
            return parse_day(text, opened).isoformat(), ""
        except (ValueError, OverflowError):
            return None, self.invalid


class DateTime(Date):
    """A day and a time of it."""

    invalid = NOT_A_TIME

    def for_mattermost(self) -> Json:
        element = super().for_mattermost()
        if "default" in element:  # 11.6's client refuses it in any other form
            element["default"], _ = self.read_text(clean(element["default"]), utc_now())
        return element

    def read_text(self, text: str, opened: datetime.datetime) -> Reading:
        try:
            moment = parse_time(text, opened)
            moment.astimezone(self.zone)  # the last hours of the last year are not everywhere
            return in_utc(moment), ""
        except (ValueError, OverflowError):
            return None, self.invalid

    def brief(self, answer: Any, names: Names, mentions: dict[str, str]) -> str:
        return self.markdown(answer, names)

    def markdown(self, answer: Any, names: Names) -> str:
        moment = datetime.datetime.fromisoformat(answer).astimezone(self.zone)
        return inline_code(f"{moment.date()} {moment:%H:%M %Z}")


TYPES: dict[str, type[Element]] = {
    "text": Text, "textarea": Textarea, "select": OptionSelect, "radio": Radio, "bool": Bool,
    "date": Date, "datetime": DateTime}
DATA_SOURCES: dict[str, type[Element]] = {  # of a select
    "users": UserSelect, "channels": ChannelSelect}


def read_element(element: Any) -> Element:
    """Return an element of a form, with all that is wrong with it."""
    if not isinstance(element, dict):
        return Element(element)
    key, kinds = "type", TYPES
    if element.get("type") == "select" and element.get("data_source"):
        key, kinds = "data_source", DATA_SOURCES
    value = str(element.get(key))
    if value in kinds:
        known = kinds[value](element)
        default = clean(known.raw.get("default", ""))
        if default and (problem := known.default_problem(default)):
            known.problems.append(f"default {default!r:.60}: {problem}")
        return known
    unknown = Element(without(element, OUR_KEYS))
    if key == "data_source" or key in unknown.raw:  # else sound_part() has said that it is missing
        hint = UNSUPPORTED.get(value, f"only {', '.join(kinds)}")
        unknown.problems.append(f"{key} {value!r} is not supported: {hint}")
    return unknown


def read_elements(elements: list[Any], problems: list[str]) -> list[Element]:
    """Return the elements of a form; add to `problems` all that is wrong with them."""
    found = [read_element(element) for element in elements]
    names: list[Any] = []
    for number, element in enumerate(found, 1):
        if element.name in names:
            element.problems.append("another one has the same name")
        names.append(element.name or number)
        problems += [f"element {names[-1]}: {problem}" for problem in element.problems]
    if sum("subject" in element.raw for element in found) > 1:
        problems.append("subject: only one element can be the subject")
    return found


class Form:
    """The dialog that people fill in: as Mattermost gets it, and what its elements mean."""

    def __init__(self, form: Any, source: str) -> None:
        """Take a form, and where it is from; raise ValueError with all that is wrong, in lines."""
        self.source = source
        # A dialog is judged by the form that it was opened with: one of another form is refused.
        self.fingerprint = fingerprint(form)
        problems: list[str] = []
        dropped = [key for key in KEYS_NOT_TO_SET if isinstance(form, dict) and form.get(key)]
        form = sound_part(without(form, dropped) if dropped else form, FORM_KEYS, problems)
        self.elements = read_elements(form.get("elements", []), problems)
        if problems:
            raise ValueError("\n".join(problems))
        # Whose answer a ticket is called by: else the first textarea that was filled in, or, where
        # there are none, the first text.
        texts = [element for element in self.elements if isinstance(element, Text)]
        self.subjects = ([element for element in texts if element.raw.get("subject")]
                         or [element for element in texts if element.is_block] or texts[:1])
        self.mention: str = form.get("mention", "")
        self.mentions = list(dict.fromkeys(
            filter(None, [self.mention, *self.of_options("mention")])))
        self.channels = list(dict.fromkeys(self.of_options("channel")))
        self.options_give_channel = any(
            isinstance(element, OptionSelect) and not element.is_optional
            and all("channel" in option for option in element.options.values())
            for element in self.elements)
        self.frame = {**without(form, OUR_KEYS), "callback_id": "ticket"}  # around the elements
        self.title: str = form["title"]
        if (size := len(json_bytes(self.dialog()))) > DIALOG_BYTES:
            raise ValueError(f"must have at most {DIALOG_BYTES} bytes in all, not {size}")
        self.notes = [f"{key} is dropped: it is for the service to set" for key in dropped]
        self.notes += [f"element {element.name}: {note}"
                       for element in self.elements for note in element.notes()]

    def of_options(self, key: str) -> list[str]:
        """Return the values of a key of ours in all options."""
        return [option[key] for element in self.elements if isinstance(element, OptionSelect)
                for option in element.options.values() if key in option]

    def needs(self, version: tuple[int, ...]) -> Iterator[tuple[str, str]]:
        """Yield what a version of Mattermost, such as (10, 9), does not know: a level, and what."""
        for element in self.elements:
            for level, what, needed, remark in element.needs():
                if version < needed:
                    yield level, (f"element {element.name}: {what} needs Mattermost "
                                  f"{needed[0]}.{needed[1]}{remark}")

    def dialog(self) -> Json:
        """Return the dialog, as Mattermost gets it now."""
        return {**self.frame, "elements": [element.for_mattermost() for element in self.elements]}

    def prefilled(self, text: str) -> tuple[Json, bool]:
        """Return the dialog with a text in its first textarea, and whether all of it found room."""
        dialog = self.dialog()
        for index, element in enumerate(self.elements):
            if text and isinstance(element, Textarea):
                # JSON takes two bytes for a quote
                room = (DIALOG_BYTES - len(json_bytes(dialog))) // 2
                default = text[:element.most].encode()[:room].decode(errors="ignore")
                dialog["elements"][index]["default"] = default
                return dialog, default == text
        return dialog, not text

    def filled(self, values: Json, names: dict[str, str]) -> Json | None:
        """Return the dialog with a ticket's answers in it; None if they do not fit any more."""
        known = {element.name: element for element in self.elements}
        if not all(name in known and known[name].fits(answer) for name, answer in values.items()):
            return None
        elements = [element.filled(values.get(element.name), names) for element in self.elements]
        return {**self.frame, "submit_label": SAVE, "elements": elements}

    def keeping_people_and_channels(self, submitted: Json, values: Json) -> Json:
        """Return what was submitted, with a ticket's people and channels where it is empty."""
        return {**submitted, **{
            element.name: values[element.name] for element in self.elements
            if element.data_source and element.name in values
            and submitted.get(element.name) in (None, "", [])}}

    def values_in(self, submission: Json, opened: int) -> Json:
        """Return the answers in a submission, by element name; raise FieldProblems.

        `opened` is when the form was, in seconds since 1970.
        """
        values, errors = {}, {}
        moment = datetime.datetime.fromtimestamp(opened, datetime.UTC)
        for element in self.elements:
            answer, problem = element.read(submission.get(element.name), moment)
            if problem:
                errors[element.name] = problem
            elif answer is not None:
                values[element.name] = answer
        if errors:
            raise FieldProblems(errors)
        return values

    def answered(self, values: Json) -> list[tuple[Element, Any]]:
        """Return (element, its answer) for each answer, in the order of the form."""
        return [(element, values[element.name])
                for element in self.elements if element.name in values]

    def channel_of(self, values: Json) -> str:
        """Return the channel of the first chosen option that has one, or ""."""
        return next((option["channel"] for element, answer in self.answered(values)
                     if isinstance(element, OptionSelect) for option in element.chosen(answer)
                     if "channel" in option), "")

    def subject_element(self, values: Json) -> Text | None:
        """Return whose answer a ticket is called by."""
        return next((element for element in self.subjects
                     if isinstance(values.get(element.name), str)), None)

    def subject(self, values: Json) -> str:
        """Return the heading of a ticket: from its answers, or the form's title; perhaps ""."""
        element = self.subject_element(values)
        subject = element.subject(values[element.name]) if element else ""
        return subject or heading(clean(self.title))

    def body(self, answers: Answers, subject: str | None = None) -> list[str]:
        """Return the lines that show answers: in a ticket, without what its heading says.

        `subject` is what the heading says, "" if it is not ours; None in a reply, which shows all.
        """
        called_by = None if subject is None else self.subject_element(answers.values)
        text, row = "", []
        for element, answer in self.answered(answers.values):
            if subject is not None and not element.is_shown(answer):
                continue
            if element is called_by and called_by.is_said_by(subject or "", answer):
                continue
            markdown = element.markdown(answer, answers.names)
            if not element.is_block:
                row.append(f"{element.label} {markdown}")
                continue
            label = "" if element is called_by else f"{element.label}\n"
            text += in_one_line(row) + label + markdown
            row = []
        return (text + in_one_line(row)).rstrip("\n").split("\n") if text or row else []

    def news(self, old: Json, answers: Answers) -> Iterator[str]:
        """Yield a line for each answer that is not as it was; who was mentioned before, is not."""
        mentioned = {self.mention, *(key for element, answer in self.answered(old)
                                     for key in element.mentions(answer, answers.names))}
        for element in self.elements:
            before, after = (values.get(element.name) for values in (old, answers.values))
            if before == after:
                continue
            if after is None:
                yield f"{element.label} {NO_ANSWER}"
                continue
            new = {key: mention for key, mention in element.mentions(after, answers.names).items()
                   if mention and key not in mentioned}
            mentioned.update(new)
            yield f"{element.label} {element.brief(after, answers.names, new)}"


def in_one_line(short: list[str]) -> str:
    """Return short answers as a line of a ticket."""
    return " · ".join(short) + "\n" if short else ""


# ----------------------------------------------------------------------------------- 6. Typed text
#
# What people type, as Markdown. It promises that this pings no channel, loads no image, and stays
# in its place, in every client: by its shape, not by knowing what each of them sees in it.

# What Mattermost's clients break a line at.
LINE_END_RE = re.compile("\r\n|[\r\v\f\x85\u2028\u2029\u2424]")
# Control characters, what turns the direction of a text, and what nobody sees, but a search does.
UNSEEN_RE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff"
                       "\xad\u200b\u2060\u3164\ufeff]")
ISOLATE_RE = re.compile("[\u2066-\u2069]")  # begins or, the last one, ends a change of direction
POP_ISOLATE = "\u2069"

JOINER = "\u2060"  # invisible; Mattermost sees no mention, image or hashtag where it stands
STATUS_TAG_RE = re.compile(f"#(?={TAG_NAME})", re.IGNORECASE)

# A letter or digit: with one beside it, as in x@all, Mattermost sees no mention. But [w@all](u) is
# one, since Mattermost cuts a link's text at a w, looking for www. And from U+0250 on, there are
# letters that its Unicode may not know. So these do not count as letters: we break an @all beside
# them.
LETTER = r"[^\W_wW\u0250-\U0010ffff]"
CHANNEL_MENTION = f"(?<!{LETTER})@(?=(?i:all|channel|here)(?!{LETTER}))"
# &#64;all is an @all for Mattermost, and so is @&#97;ll.
REFERENCE = r"&(?=(?i:#x?[0-9a-f]{1,8}|commat);)"
PING_RE = re.compile(f"{CHANNEL_MENTION}|{REFERENCE}")
# ![x](url); !\[x](url) is one as well, where it is in the text of a link.
IMAGE_RE = re.compile(r"!(?=\\*\[)")
# What may be a definition, [x]: url, also behind >, - or - [ ], and over several lines. A match
# ends at the first ] that is neither escaped nor that of a - [ ]. Some programs end the label at an
# escaped ] as well, or at that of a - [ ]: so quote() breaks every ]: in a match.
TASK = r"\[[ xX]\](?=\s)"
DEFINITION_RE = re.compile(rf"^(?:[ \t\xa0>*+\-\d.)]|{TASK})*\[(?:{TASK}|[^\]\\]|\\.)*+(?:\]:)?",
                           re.MULTILINE | re.DOTALL)
# A line: blanks (no-break spaces, too, as in the web clients), marks, and what follows.
FENCE_RE = re.compile(r"([ \t\xa0]*)(`{3,}+(?=[^`]*$)|~{3,})(.*)")
LANGUAGE_RE = re.compile(r"[A-Za-z]*[+#]*")  # of the code between fences: as c++

# A heading's alphabet: __init__.py **breaks** [here](u) becomes init .py breaks here (u).
NOT_IN_HEADING_RE = re.compile(
    r"""(?![.,:;?()/%+=\-'"_])[\x21-\x2f\x3a-\x40\x5b-\x60\x7b-\x7e]"""  # ASCII's, but for these
    r"|(?<![^\W_])_|_(?![^\W_])"  # _ is a letter between two
    "|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # marks of direction
MAX_HEADING, MIN_HEADING = 80, 40  # characters: it is cut between these, if a blank is there


def without_blank_ends(text: str) -> str:
    """Return a text without blank lines at its ends, and blanks at its end."""
    return re.sub(r"\A\s*\n", "", text).rstrip()


def clean(text: str) -> str:
    """Return what a person typed, with plain line ends and without what can't be seen or sent.

    The first of several lines stays indented, as in code.
    """
    text = UNSEEN_RE.sub("", LINE_END_RE.sub("\n", text))
    if ISOLATE_RE.search(text):
        text = "\n".join(map(with_paired_isolates, text.split("\n")))
    text = without_blank_ends(text)
    return text if "\n" in text else text.strip()


def with_paired_isolates(line: str) -> str:
    """Return a line without the isolates that do not belong together in it."""
    begun: list[int] = []
    lone = set()
    for found in ISOLATE_RE.finditer(line):
        if found[0] != POP_ISOLATE:
            begun.append(found.start())
        elif begun:
            begun.pop()
        else:
            lone.add(found.start())
    lone.update(begun)
    return "".join(mark for index, mark in enumerate(line) if index not in lone)


def one_line(text: str) -> str:
    """Return a text in one line, as a log or a label can hold it: 300 characters at most."""
    return " ".join(clean(text).split())[:300]


def heading(text: str) -> str:
    """Return a text reduced to the alphabet of a ticket's heading, and cut.

    Nothing in it is a mention, a hashtag, a reference, an image or emphasis.
    """
    text = " ".join(NOT_IN_HEADING_RE.sub(" ", text).split()).rstrip(" ,:;")
    if len(text) <= MAX_HEADING:
        return text
    end = text.rfind(" ", MIN_HEADING, MAX_HEADING + 1)
    return text[:end if end > 0 else MAX_HEADING] + "…"


def subject_of(text: str, is_code: bool = False) -> str:
    """Return the first line of what was typed that tells something, as a heading; or ""."""
    parts = [text] if is_code else [prose for prose, _, _ in split_at_fences(text)]
    return next((heading(line) for part in parts for line in part.split("\n")
                 if any(map(str.isalnum, line))), "")


def longest_run(mark: str, text: str) -> int:
    """Return the length of the longest run of a character."""
    return max(map(len, re.findall(f"{mark}+", text)), default=0)


def inline_code(text: str) -> str:
    """Return Markdown that shows a text as it is, in one line."""
    text = text.replace("\n", " ")
    ticks = "`" * (longest_run("`", text) + 1)
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{room}{text}{room}{ticks}"


def code_block(text: str, language: str = "") -> str:
    """Return Markdown that shows a text as it is."""
    fence = "`" * max(3, longest_run("`", text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def untagged(text: str) -> str:
    """Return a text that puts no ticket into a list of open, taken or closed ones."""
    return STATUS_TAG_RE.sub(f"#{JOINER}", text)


def quotes_and_code(text: str) -> str:
    """Return what was typed, as Markdown that pings no channel and loads no image.

    In code nothing can happen, and people copy from it: it stays as it is. In prose, an invisible
    character breaks what pings or loads. But only fences (``` or ~~~) tell reliably where code is:
    the programs that read Markdown differ on all else. So a text is cut at its fences. Prose
    becomes a quote, which they all end at the empty line behind it, and what was between two fences
    is put between fences of ours, longer than any in it, at the beginning of a line, where they all
    see them.
    (Status tags are broken afterwards, in code too: Mattermost counts hashtags there.)
    """
    return "".join(quote(prose) + (typed_code(fence, code) if fence else "")
                   for prose, fence, code in split_at_fences(text))


def split_at_fences(text: str) -> Iterator[tuple[str, re.Match[str] | None, list[str]]]:
    """Yield prose, the fence behind it, and the lines of code behind that; no fence at the end."""
    prose, lines = "", iter(text.split("\n"))
    for line in lines:
        fence = FENCE_RE.fullmatch(line)
        if not fence:
            prose += line + "\n"
            continue
        # This takes the line that ends the code, too, and drops it.
        code = itertools.takewhile(lambda line: not ends_code(line, fence), lines)
        yield prose, fence, list(code)
        prose = ""
    yield prose, None, []


def ends_code(line: str, fence: re.Match[str]) -> bool:
    """Return whether a line closes a fence: with as many marks or more, nothing else,
    and at most 3 blanks more in front, as Markdown has it.
    """
    end = FENCE_RE.fullmatch(line)
    return bool(end and end[2].startswith(fence[2]) and not end[3].strip()
                and len(end[1].expandtabs()) <= len(fence[1].expandtabs()) + 3)


def typed_code(fence: re.Match[str], lines: list[str]) -> str:
    """Return the lines that stood between two fences, in a code block, and an empty line."""
    blanks, language = re.compile(f"[ \t\xa0]{{0,{len(fence[1])}}}"), fence[3].strip()
    lines = [blanks.sub("", line, count=1) for line in lines]
    if not LANGUAGE_RE.fullmatch(language):  # it is typed text, which nobody would see there
        lines, language = [language, *lines], ""
    return code_block("\n".join(lines), language) + "\n\n"


def quote(prose: str) -> str:
    """Return prose in a quote, and an empty line; nothing in it pings a channel or loads images."""
    prose = without_blank_ends(prose)
    if not prose:
        return ""
    # An image needs a ]( behind its ![: without one, vec![1] stays as it was typed.
    before, mark, after = prose.rpartition("](")
    prose = IMAGE_RE.sub(f"!{JOINER}", before) + mark + after
    # A definition is not shown, and makes an image of a mere ![x].
    prose = DEFINITION_RE.sub(lambda found: found[0].replace("]:", f"]{JOINER}:"), prose)
    prose = PING_RE.sub(rf"\g<0>{JOINER}", prose)
    return "".join(f"> {line}\n" for line in prose.split("\n")) + "\n"


# ------------------------------------------------------------------------------------- 7. Settings
#
# What the environment tells the service. It promises that all that is wrong is said at once.

TOKEN_RE = re.compile("[A-Za-z0-9]+")


class SettingsError(Exception):
    """All that is wrong with the settings, a line each."""


def text_of_file(path: str, most: int) -> str:
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


def read_form(path: str) -> Form:
    """Return the form in a JSON file."""
    text = text_of_file(path, 1_000_000)
    try:
        form = foreign_json(text.encode())
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    return Form(form, "FORM_FILE")


def read_url(text: str, suffix: str) -> str:
    """Return an http or https URL without a slash at its end; the suffix is what we add to it."""
    url = urllib.parse.urlsplit(text)
    if not PRINTABLE_RE.fullmatch(text) or url.scheme not in ("http", "https") or (
            not url.hostname or url.netloc.endswith(":")):
        raise ValueError("must be a URL such as https://host or http://host:8080/path, no quotes")
    if url.port == 0 or any(mark in text for mark in "@?#\"'"):
        raise ValueError("must be a URL without user name, query, fragment and quotes")
    text = url.scheme + text[len(url.scheme):].rstrip("/")  # in lower case, whatever was typed
    if text.endswith(suffix):
        raise ValueError(f"must not end in {suffix}: that is added")
    return text


def read_token(text: str) -> str:
    """Return a token of Mattermost's."""
    if not TOKEN_RE.fullmatch(text):
        raise ValueError("must be letters and digits only: no quotes, no spaces")
    return text


def read_tokens(text: str) -> list[bytes]:
    """Return one or several tokens."""
    tokens = [read_token(token).encode() for token in re.split(r"[\s,]+", text) if token]
    if not tokens:
        raise ValueError("must hold a token")
    return tokens


def read_channel(text: str) -> str:
    """Return the ID of a channel."""
    if not CHOSEN_ID_RE.fullmatch(text):
        raise ValueError("must be a channel's ID (26 letters and digits), not its name")
    return text


def read_port(text: str) -> int:
    """Return a port number; 0 lets the system choose one."""
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError("must be a number from 0 to 65535")
    return int(text)


def read_address(text: str) -> str:
    """Return an address of this machine."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise ValueError("must be an IP address, such as 127.0.0.1 or ::1, no name") from error


def tls_context(ca_file: str) -> ssl.SSLContext:
    """Return an SSL context; ssl itself says nothing when it has nobody to trust.

    OpenSSL reads two variables of the process by itself: they are removed if they are blank.
    """
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if name in os.environ and not os.environ[name].strip():
            del os.environ[name]
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        raise ValueError(f"can't be used: {error}") from error
    # On by default from Python 3.13: it refuses private CAs that curl, Go and browsers accept.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    directory = ssl.get_default_verify_paths().capath
    certificates = context.cert_store_stats()["x509"] or (directory and os.listdir(directory))
    if not ca_file and not certificates:
        raise ValueError("is needed: this system has no CA certificates of its own")
    return context


class Setting(NamedTuple):
    """A variable: what it means, how its text is read, and what it is without one."""

    name: str
    meaning: str
    parse: Callable[[str], Any]  # raises ValueError with what is wrong
    default: Any = None  # None: there must be one
    in_file: bool = False  # whether <name>_FILE may name a file that holds it
    is_secret: bool = False  # whether it must not be shown

    def read(self, environ: Environ) -> Any:
        """Return its value, from a variable or from the file that <name>_FILE names.

        One that is blank counts as not set. Raise ValueError with what is wrong, a line each.
        """
        text = environ.get(self.name, "").strip()
        if self.in_file and (path := environ.get(f"{self.name}_FILE", "").strip()):
            if text:
                raise ValueError(f"is given twice: as {self.name} and as {self.name}_FILE")
            text = self.text_in(path)
        if not text and self.default is None:
            raise ValueError(f"is missing: {self.meaning}")
        try:
            return self.parse(text) if text else self.default
        except ValueError as error:
            if self.is_secret:
                raise
            shown = re.sub(r"(\w+://)?.*@", "\\1…@", text)[:200]  # without user name and password
            raise ValueError("\n".join(
                f"{shown!r}: {line}" for line in str(error).splitlines())) from error

    def text_in(self, path: str) -> str:
        """Return the text in a file, without blanks at its ends."""
        # Where the file of a secret is named, somebody may have put the secret itself.
        file = f"of {self.name}_FILE" if self.is_secret and "/" not in path else (
            f"of {self.name}_FILE {path!r}")
        try:
            text = text_of_file(path, 100_000).strip()
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if not text:
            raise ValueError(f"{file}: is empty")
        return text


Environ = Mapping[str, str]


def setting(*details: Any, **more: Any) -> Any:
    """Return a field of Settings that is read from a variable."""
    one = Setting(*details, **more)
    return field(repr=not one.is_secret, metadata={"setting": one})


@dataclass(frozen=True)
class Settings:
    """What the environment tells the service, one variable a field."""

    mattermost_url: str = setting(
        "MATTERMOST_URL", "where this service reaches Mattermost: https://mattermost.example.com",
        functools.partial(read_url, suffix="/api/v4"), in_file=True)
    bot_token: str = setting(
        "BOT_TOKEN", "access token of the bot account", read_token, in_file=True, is_secret=True)
    slash_tokens: list[bytes] = setting(  # what we seal is sealed with the first
        "SLASH_TOKEN", "token of the slash command; several (one per team) with commas in between",
        read_tokens, in_file=True, is_secret=True)
    callback_url: str = setting(
        "CALLBACK_URL", "where Mattermost reaches this service: http://tickets.example.com:8080",
        functools.partial(read_url, suffix="/ticket"), in_file=True)
    port: int = setting("PORT", "port to listen on; default 8080", read_port, 8080)
    listen_address: str = setting(
        "LISTEN_ADDRESS", "IP address to listen on; default: all of this machine", read_address, "")
    ticket_channel: str = setting(
        "TICKET_CHANNEL", "ID of one channel for all tickets; default: where /ticket is typed",
        read_channel, "", in_file=True)
    form: Form = setting(
        "FORM_FILE", "JSON file with a form of your own; default: the built-in form", read_form, "")
    tls: ssl.SSLContext | None = setting(  # None if all is http
        "SSL_CERT_FILE", "CA certificates to trust; default: those of the system", tls_context, "")

    @classmethod
    def from_environment(cls, environ: Environ) -> Settings:
        """Return the settings in a mapping; raise SettingsError with all that is wrong in it."""
        values, problems = read_settings(environ, SETTINGS)
        if values.get("form") == "":
            try:
                values["form"] = Form(FORM, "FORM")
            except ValueError as error:
                problems += [f"FORM {line}" for line in str(error).splitlines()]
        if values.get("bot_token", "").encode() in values.get("slash_tokens", []):
            problems.append("SLASH_TOKEN is the bot's token: it must be that of the slash command")
        if problems:
            raise SettingsError("\n".join(problems))
        return cls(**values)


SETTINGS: dict[str, Setting] = {
    one.name: one.metadata["setting"] for one in fields(Settings)}  # by the field's name


def read_settings(environ: Environ, settings: dict[str, Setting]
                  ) -> tuple[dict[str, Any], list[str]]:
    """Return values of settings by the names of their fields, and all that is wrong with them."""
    values: dict[str, Any] = {}
    problems = []
    for name, one in settings.items():
        try:
            values[name] = one.read(environ)
            if name == "tls" and not values[name]:  # MATTERMOST_URL stands in front of it
                is_https = values.get("mattermost_url", "").startswith("https:")
                values[name] = tls_context("") if is_https else None
        except (OSError, ValueError) as error:
            problems += [f"{one.name} {line}" for line in str(error).splitlines()]
    return values, problems


def is_loopback(url: str) -> bool:
    """Return whether a URL leads back to the machine that it is used on."""
    host = (urllib.parse.urlsplit(url).hostname or "").rstrip(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


# ------------------------------------------------------------------------------- 8. The HTTP edge
#
# Skip this unless HTTP is your problem. It promises that each request that is good gets one
# response, in time, that no client can take more than its share, and that nobody below has to
# count the time.

HEAD_BYTES = 16 * 1024  # of request line and headers
BODY_BYTES = 256 * 1024  # form-encoded, 16,383 characters are up to 196 KB
# Mattermost takes 300,000 bytes of its client, and writes some as six: < as \u003c. Whatever it can
# send is answered: a refusal would close the dialog.
SUBMISSION_BYTES = 2 * 2**20
ALL_BYTES = 48 * 2**20  # of all requests that are arriving, or wait for a thread
BYTES_AT_ONCE = 64 * 1024  # that are taken from a connection
NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
HEAD_RE = re.compile(
    rb"(?:\r\n)?(%b) (/[!-~]*) (HTTP/1\.[01])\r\n((?:%b:[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n"
    % (NAME, NAME))
BARE_LF_RE = re.compile(rb"(?<!\r)\n")
HOST_RE = re.compile(rb"[\w.~:\[\]-]*")  # may be empty: RFC 9112, 3.2
ONLY_ONCE = (b"host", b"content-length", b"content-type", b"authorization", b"expect")
TLS_HELLO = b"\x16"  # the first byte of a connection that speaks TLS


class Route(NamedTuple):
    """What is done with the body of a request: it is read, reacted to, and answered."""

    most_bytes: int  # of the body
    read: Callable[[bytes, Settings], Any]  # -> what Mattermost says; may raise Refusal
    react: Callable[[TicketService, Any], Reaction]
    late: str  # the sentence for a person for whom that takes too long
    # Of a Problem, and what Mattermost says, if that is known.
    problem_response: Callable[[Problem, Any], Json]
    gives_back: bool = False  # whether that response holds what the person typed, too


HEALTH = "/health"
ROUTES = {
    "/ticket": Route(
        BODY_BYTES, SlashCommand.from_body, TicketService.on_slash_command, FORM_NOT_OPENED,
        lambda problem, command: given_back(str(problem), command.text if command else ""),
        gives_back=True),
    "/ticket/submit": Route(  # the dialog stays open, and says it
        SUBMISSION_BYTES, Submission.from_body, TicketService.on_submission, NOT_REACHED,
        lambda problem, _: {"errors": problem.errors} if isinstance(problem, FieldProblems)
        else {"error": str(problem)}),
    "/ticket/action": Route(
        BODY_BYTES, Press.from_body, TicketService.on_press, PRESS_AGAIN,
        lambda problem, _: {"ephemeral_text": str(problem)}),
}


class Head(NamedTuple):
    """Request line and headers of a request."""

    method: str
    path: str  # without the query
    is_modern: bool  # HTTP/1.1, not 1.0
    headers: dict[bytes, bytes]  # names in lower case
    size: int  # bytes


def read_head(received: bytes | bytearray) -> Head | None:
    """Return the head that begins these bytes, None if more of it is to come; or raise Refusal.

    Strictly: what can be read in two ways is refused, since a proxy in front of us may have read it
    the other way. http.server's own parser is lenient, and most of its cost.
    """
    if received.startswith(TLS_HELLO):
        raise Refusal(400, "this is TLS, and the service speaks http: put a proxy in front")
    end = received.find(b"\r\n\r\n", 2)  # RFC 9112, 2.2: one empty line may come first
    head = bytes(received[:end + 4] if end >= 0 else received[:HEAD_BYTES + 1])
    if BARE_LF_RE.search(head):
        raise Refusal(400, "a line of the head ends without a carriage return")
    if len(head) > HEAD_BYTES:
        raise Refusal(431, "the head of the request is too long")
    if end < 0:
        return None
    match = HEAD_RE.fullmatch(head)
    if not match:
        raise Refusal(400, "the head of the request is malformed")
    method, target, version, lines = match.groups()
    headers: dict[bytes, bytes] = {}
    for line in lines.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name in ONLY_ONCE and name in headers:
            raise Refusal(400, f"{name.decode()} is there twice")
        headers[name] = value.strip(b" \t")
    path = target.partition(b"?")[0].decode()
    return Head(method.decode(), path, version == b"HTTP/1.1", headers, len(head))


def body_length(head: Head) -> int:
    """Return the length of a request's body; raise Refusal if its head is bad.

    Too much is refused before it is read, and so is what nobody would answer.
    """
    method, path, is_modern, headers, _ = head
    if b"transfer-encoding" in headers:
        raise Refusal(501, "Transfer-Encoding is not supported")
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise Refusal(417, "Expect is not supported, but for 100-continue")
    if (is_modern and b"host" not in headers) or not HOST_RE.fullmatch(headers.get(b"host", b"")):
        raise Refusal(400, "Host is missing or malformed")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit():
        raise Refusal(400, "Content-Length is malformed")
    if path not in ROUTES and path != HEALTH:
        raise Refusal(404, "there is nothing at this path")
    allowed = "GET, HEAD" if path == HEALTH else "POST"
    if method not in allowed.split(", "):
        raise Refusal(405, f"the method must be {allowed.replace(',', ' or')}", f"Allow: {allowed}")
    if method == "POST" and b"content-length" not in headers:
        raise Refusal(411, "Content-Length is missing")
    most = BODY_BYTES if path == HEALTH else ROUTES[path].most_bytes
    if len(length) > 9 or int(length) > most:
        raise Refusal(413, f"the body is longer than {most} bytes")
    return int(length)


class Budget:
    """Bytes that may be in memory; Request.keep() spends them, let_go() gives them back."""

    def __init__(self, size: int) -> None:
        self.left, self.lock = size, threading.Lock()


@dataclass(slots=True, eq=False)
class Request:
    """The only request of a connection.

    | it is     | in the server's tables | for so long                           | and then        |
    |-----------|------------------------|---------------------------------------|-----------------|
    | arriving  | arriving               | until it is all here; 10 s            | judged, dropped |
    | refused   | unanswered             | no time                               | answered        |
    | answered, | arriving               | while its client still sends; 2 s     | dropped         |
    | refused   |                        |                                       |                 |
    | waiting   | waiting, unanswered    | until a thread is free; 24 s in all   | worked on, or   |
    |           |                        |                                       | answered: late  |
    | worked on | unanswered             | until the thread answers; 24 s in all | answered, or    |
    |           |                        |                                       | answered: late  |

    A health check is answered as soon as it is here. An answered connection is closed.
    """

    socket: socket.socket
    address: str  # of the client
    budget: Budget
    accepted: float  # when, by time.monotonic()
    due: float  # when what it is now has to end
    received: bytearray = field(default_factory=bytearray)
    head: Head | None = None
    begins: int = 0  # where the body does, in what is received
    ends: int = 0
    refusal: Refusal | None = None  # what is still sent is dropped
    said: Any = None  # what Mattermost says with it, once that has been read

    def keep(self, data: bytes) -> None:
        """Keep what has arrived."""
        with self.budget.lock:
            self.received += data
            self.budget.left -= len(data)

    def let_go(self) -> bytes:
        """Return the body, and keep it no longer."""
        with self.budget.lock:  # a thread and the loop may both do so
            received, self.received = self.received, bytearray()
            self.budget.left += len(received)
        return bytes(received[self.begins:self.ends])

    def parse(self) -> bool:
        """Read head and length, if they are here; return whether a request is whole, or refused."""
        try:
            if not self.head:
                self.head = head = read_head(self.received)
                if not head:
                    return False
                self.begins, self.ends = head.size, head.size + body_length(head)
                if (head.is_modern and b"expect" in head.headers
                        and len(self.received) == head.size):
                    self.socket.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)
            return len(self.received) >= self.ends
        except Refusal as refusal:
            self.refusal = refusal
            return True


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives one response to one request that is all here, or that is refused, and closes.

    So no request can hide behind another, no thread waits for one to arrive, and Mattermost loses
    no POST on a connection that is just being closed. `self.request` is a Request, and no socket.
    """

    server: Server
    request: Request
    timeout = 10  # seconds for the response, if the client does not read it
    note = ""  # what the log has still to say

    def setup(self) -> None:
        """Take the request from memory."""
        head = self.request.head
        self.command, self.path = (head.method, head.path) if head else ("", "")

    def handle(self) -> None:
        """Answer the request."""
        try:
            if self.request.refusal:
                raise self.request.refusal
            if self.path == HEALTH:
                self.answer(200, {"status": "ok"})
            else:
                self.answer_person(ROUTES[self.path])
        except Refusal as refusal:
            self.note = refusal.log
            self.answer(refusal.status, {"error": str(refusal)}, *refusal.headers)

    def finish(self) -> None:
        """Do nothing: each response has been sent at once."""

    def answer_person(self, route: Route) -> None:
        """Answer a person with 200, whatever happens, and do what follows.

        For anything else, Mattermost would throw the form away, and what was typed with it.
        """
        request, reaction = self.request, None
        try:
            # A LateHandler finds here what a thread has read.
            if said := request.said or self.read(route):
                request.said = said
            reaction = self.react(route, said)
            response = next(reaction)
        except Refusal:
            raise
        except Problem as problem:
            self.note = problem.log
            response = route.problem_response(problem, request.said)
        except Exception:  # a bug of ours must not cost anybody their text
            log.exception("POST %s failed", self.path)
            response = route.problem_response(Problem(OUR_FAULT), request.said)
        self.answer(200, response)
        if reaction:
            if self.note:  # another handler had answered, so answer() did not log it
                log.warning("POST %s, after a late answer: %s", self.path, self.note)
            next(reaction, None)  # does nothing if it has ended, with a Problem

    def read(self, route: Route) -> Any:
        """Return the command, submission or press in the request."""
        return route.read(self.request.let_go(), self.server.service.settings)

    def react(self, route: Route, said: Any) -> Reaction:
        """Return the reaction to it."""
        return route.react(self.server.service, said)

    def answer(self, status: int, payload: Json, *headers: str) -> None:
        """Send a response and close, unless another handler was first.

        In one write: Mattermost 9.4 to 9.7 loses a body that comes later.
        """
        if not self.server.unanswered.pop(self.request, None):  # in one step, so one is the first
            return
        body = json_bytes(payload)
        head = "\r\n".join((
            f"HTTP/1.1 {status} {self.responses[status][0]}",
            f"Date: {self.date_time_string()}", "Content-Type: application/json",
            f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""))
        self.request.let_go()
        with contextlib.suppress(OSError):  # the client is gone
            self.send(head.encode() + (b"" if self.command == "HEAD" else body))
        self.log_request(status)
        self.server.close_answered(self.request)

    def send(self, response: bytes) -> None:
        """Send a response, and wait until the client has taken it."""
        self.request.socket.settimeout(self.timeout)
        self.request.socket.sendall(response)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log a line for each response, but for good health checks; never a query or a body."""
        if code == 200 and self.path == HEALTH:
            return
        level = logging.WARNING if self.note or code != 200 else logging.INFO
        what = f"{self.command[:20]} {self.path[:200]!r}" if self.command else "no HTTP"
        log.log(level, "%s", f"{self.client_address} {what} {code} {self.note}".rstrip())
        self.note = ""  # it is said


class LateHandler(Handler):
    """Answers a person whose request is due, or has to give way: in Server's loop, so at once."""

    def read(self, route: Route) -> Any:
        """Read what will be given back, if it is still here: the loop has no time for more."""
        return super().read(route) if route.gives_back and self.request.received else None

    def react(self, route: Route, said: Any) -> Reaction:
        """Say that it took too long."""
        seconds = time.monotonic() - self.request.accepted
        raise Problem(route.late, log=f"there was no answer within {seconds:.0f} s")

    def send(self, response: bytes) -> None:
        """Leave a response to the system, which has room for 200 KB at least."""
        self.request.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(response))
        self.request.socket.send(response, socket.MSG_DONTWAIT)


class Listener(http.server.ThreadingHTTPServer):
    """Listens on an address, or on all of IPv4 and IPv6."""

    request_queue_size = 1024

    def __init__(self, address: str, port: int, handler: type[Handler]) -> None:
        is_both = socket.has_dualstack_ipv6() and not address
        self.address_family = socket.AF_INET6 if is_both or ":" in address else socket.AF_INET
        super().__init__((address, port), handler)

    def server_bind(self) -> None:
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
    a short response to a new connection can't block. A whole request waits for a free thread, which
    waits for Mattermost, and for other requests about the same ticket.

    A request ends in one of two ways: it is answered, or it is dropped. `unanswered` has each that
    is whole or refused. Whoever takes it out, in one step, answers it: its thread or, when it is
    due, the loop. So a person gets one response, in time, and nothing below has to count that time.
    Nothing that a client or Mattermost does can end the loop.
    """

    arrive_within = 10  # seconds in which a request has to arrive
    answer_within = 24  # seconds, those included, to its response: Mattermost gives up after 30
    look_every = 0.05  # seconds, for what is due
    grace = 0.1  # seconds in which no connection gives way: an honest client has sent all by then
    linger = 2  # seconds for which a refused client may go on sending
    stop_within = 1  # second, in which requests that are on their way have to be here
    follow_up_within = 20  # seconds after the last response, at a stop

    def __init__(self, service: TicketService, address: str, port: int, files: int = 1024,
                 threads: int = 128) -> None:
        """Listen; `files` is how many may be open, `threads` how many requests are worked on."""
        self.service = service
        # Each request takes a file, each thread another one, to call Mattermost; some are left.
        self.most_requests, self.most_threads = min(4096, files // 3), min(threads, files // 4)
        self.pool = ThreadPoolExecutor(self.most_threads)  # each thread may call Mattermost
        self.free_threads = threading.Semaphore(self.most_threads)
        self.selector = selectors.DefaultSelector()
        self.budget = Budget(ALL_BYTES)
        # The tables of the class Request: in each, the oldest are first.
        self.arriving: dict[Request, bool] = {}
        self.waiting: dict[Request, bool] = {}
        self.unanswered: dict[Request, bool] = {}
        self.next_look = 0.0
        self.stopping, self.stopped = threading.Event(), threading.Event()
        super().__init__(address, port, Handler)

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serve until shutdown(): the stock loop looks at the listening socket only."""
        self.selector.register(self.socket, selectors.EVENT_READ)
        while not self.stopping.is_set():
            self.serve(poll_interval)
        ends = time.monotonic() + self.answer_within + self.follow_up_within
        self.selector.unregister(self.socket)
        for _ in range(self.request_queue_size):  # whom the kernel has taken already
            if not self.accept():
                break
        self.socket.close()
        for request in self.arriving:
            request.due = min(request.due, time.monotonic() + self.stop_within)
        while self.arriving or self.unanswered:
            self.serve(0.02)  # seconds
        for _ in range(self.most_threads):  # not for ever: one may wait for a name server
            self.free_threads.acquire(timeout=max(0, ends - time.monotonic()))
        self.pool.shutdown(wait=False)
        self.selector.close()
        self.stopped.set()

    def shutdown(self) -> None:
        """Stop accepting; return when all that was accepted is done, or `follow_up_within` over."""
        self.stopping.set()
        self.stopped.wait()

    def serve(self, seconds: float) -> None:
        """Deal with all that arrives within some seconds, and with all that is due."""
        # A thread does not tell when it is free: so this looks, while requests wait for one.
        for key, _ in self.selector.select(0.01 if self.waiting else seconds):
            if key.fileobj is self.socket:
                self.accept()
            else:
                self.receive(key.data)
        self.begin()
        if (now := time.monotonic()) > self.next_look:
            self.next_look = now + self.look_every
            requests = [*self.arriving, *list(self.unanswered)]  # list() is one step: threads pop
            for request in [one for one in requests if one.due < now]:
                self.give_way(request)
                if time.monotonic() > self.next_look:  # the rest at the next look: others wait, too
                    break

    def accept(self) -> bool:
        """Accept a connection and take what it has sent already; return whether there may be more.

        Where there are too many, the oldest gives way, once it has had its time.
        """
        now = time.monotonic()
        if len(self.arriving) + len(self.unanswered) >= self.most_requests:
            oldest = self.oldest()
            if not oldest or now - oldest.accepted < self.grace:
                time.sleep(0.01)  # seconds; who waits to be accepted is kept by the kernel
                return True
            self.give_way(oldest)
        try:
            connection, (address, *_) = self.get_request()
        except OSError as error:
            if not isinstance(error, BlockingIOError):  # no file is left: do not ask again at once
                time.sleep(0.05)
            return False
        self.receive(Request(connection, address.removeprefix("::ffff:"), self.budget, now,
                             now + self.arrive_within))
        return True

    def receive(self, request: Request) -> None:
        """Take what has arrived of a request; whatever is wrong with it, only it can fail."""
        try:
            self.make_room()
            if request.socket.fileno() < 0:  # it has just given way
                return
            is_whole = False
            with contextlib.suppress(BlockingIOError):
                data = request.socket.recv(BYTES_AT_ONCE, socket.MSG_DONTWAIT)
                if not data:
                    raise ConnectionError("the client has gone")
                if not request.refusal:  # else it has its response, and still sends
                    request.keep(data)
                    is_whole = request.parse()
            if is_whole:
                self.dispatch(request)
            else:
                self.watch(request)
        except Exception as error:
            if not isinstance(error, OSError):
                self.handle_error(request, request.address)
            self.drop(request)

    def make_room(self) -> None:
        """Let the oldest requests give way until there is room for what may be taken at once."""
        while self.budget.left < BYTES_AT_ONCE and (
                oldest := self.oldest(lambda request: bool(request.received))):
            self.give_way(oldest)

    def watch(self, request: Request) -> None:
        """Wait for more of a request."""
        if request not in self.arriving:
            self.selector.register(request.socket, selectors.EVENT_READ, request)
            self.arriving[request] = True

    def unwatch(self, request: Request) -> None:
        """Wait no longer for a request."""
        if self.arriving.pop(request, None):
            self.selector.unregister(request.socket)

    def dispatch(self, request: Request) -> None:
        """Answer a health check or a request that is refused; let any other wait for a thread."""
        self.unwatch(request)
        self.unanswered[request] = True
        if request.refusal or (request.head and request.head.path == HEALTH):
            self.answer_with(Handler, request)
            return
        request.due = request.accepted + self.answer_within
        self.waiting[request] = True

    def begin(self) -> None:
        """Let free threads work on the requests that wait."""
        while self.waiting and self.free_threads.acquire(blocking=False):
            request = next(iter(self.waiting))
            del self.waiting[request]
            with contextlib.suppress(RuntimeError):  # no thread could start, but it is queued
                self.pool.submit(self.work_on, request)

    def work_on(self, request: Request) -> None:
        """Answer a request, in a thread."""
        try:
            if request in self.unanswered:
                self.answer_with(Handler, request)
        finally:
            self.free_threads.release()

    def answer_with(self, handler: type[Handler], request: Request) -> None:
        """Let a handler answer a request; after a bug, drop it."""
        try:
            handler(request, request.address, self)  # type: ignore[arg-type]
        except Exception:
            self.handle_error(request, request.address)
            if self.unanswered.pop(request, None):
                self.drop(request)

    def oldest(self, may: Callable[[Request], bool] = lambda request: True) -> Request | None:
        """Return the oldest request that may give way, or None if there is none."""
        found = [request for table in (self.arriving, self.waiting)
                 for request in itertools.islice(filter(may, table), 1)]
        return min(found, key=lambda request: request.accepted, default=None)

    def give_way(self, request: Request) -> None:
        """End a request before it is done: a person whose request is all here is told."""
        if request in self.arriving:
            self.drop(request)
        elif request in self.unanswered:
            self.waiting.pop(request, None)
            self.answer_with(LateHandler, request)

    def drop(self, request: Request) -> None:
        """Close a connection without a response."""
        self.unwatch(request)
        request.let_go()
        self.close_request(request.socket)

    def close_answered(self, request: Request) -> None:
        """Close a connection; after a refusal later: a reset could lose the response."""
        if not request.refusal:
            self.shutdown_request(request.socket)
            return
        with contextlib.suppress(OSError):  # it has been reset: recv() will say so
            request.socket.shutdown(socket.SHUT_WR)
        request.socket.setblocking(False)
        request.due = time.monotonic() + self.linger
        self.watch(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug of ours: what clients do is no error."""
        log.exception("a request of %s failed", client_address)


# ----------------------------------------------------------------------------- 9. The command line
#
# What an admin can ask for. It promises that everything ends with a status, and every failure with
# a sentence: 1 if Mattermost or a person has to do something, 2 for settings and command line.

FILES = 16 * 1024  # that the service may open, if the system lets it
COMMAND_WAITS = 60  # seconds for an answer, however slowly it comes
SIGNALS = {signal.SIGTERM, signal.SIGINT}  # that end the service
LEVELS = {"ok": logging.INFO, "note": logging.INFO,
          "warning": logging.WARNING, "problem": logging.ERROR}
CHANNEL_MENTIONS = ("@all", "@channel", "@here")  # nobody's names

Check = tuple[str, str]  # one of LEVELS, and a sentence that begins with a setting


def address_of(host: str, port: int) -> str:
    """Return the URL at which a service that listens on a host and a port can be asked."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def health_fault(url: str, tls: ssl.SSLContext | None = None) -> str:
    """Return the reason why nothing healthy answers at a URL; "" if it does."""
    parts = urllib.parse.urlsplit(url + HEALTH)
    try:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                parts.hostname or "", parts.port, timeout=5, context=tls or tls_context(""))
        with contextlib.closing(connection):
            connection.request("GET", parts.path, headers={"User-Agent": USER_AGENT})
            response = connection.getresponse()
            if response.status == 200 and response.read(100) == json_bytes({"status": "ok"}):
                return ""
            target = redirected_to(response.headers.get("Location"), url + HEALTH)
            leads = f", and leads to {target}" if target else ""
            return f"another program answers ({response.status}){leads}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return repr(error)


def callback_checks(settings: Settings, port: int) -> Iterator[Check]:
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


def mattermost_checks(service: TicketService) -> Iterator[Check]:
    """Yield whether Mattermost answers, which one it is, and whether the bot is one."""
    try:
        config = service.mattermost.get_client_config()
    except MattermostError as error:
        yield "problem", f"MATTERMOST_URL: {error}"
        return
    version, site_url = config["Version"], str(config.get("SiteURL"))
    yield "ok", f"MATTERMOST_URL: Mattermost {version} answers"
    numbers = tuple(int(part) for part in re.findall(r"\d{1,4}", version)[:2])
    if numbers < (9, 4):
        yield "warning", "MATTERMOST_URL: before 9.4, a form has 3 seconds to open: update it"
    yield from ((level, f"{service.form.source}: {what}")
                for level, what in service.form.needs(numbers))
    if config.get("CollapsedThreads") in ("disabled", "default_off"):
        yield "note", ("MATTERMOST_URL: Collapsed Reply Threads are "
                       f"{config['CollapsedThreads']}: people who follow a ticket are not told of "
                       "replies")
    if site_url.startswith("http"):
        yield "ok", f"MATTERMOST_URL: its SiteURL, for links to tickets, is {site_url}"
    else:
        yield "warning", "MATTERMOST_URL: it has no SiteURL: set it, for the links to tickets"
    yield from bot_checks(service)


def bot_checks(service: TicketService) -> Iterator[Check]:
    """Yield whose token it is, and whether the bot may post where tickets go."""
    try:
        me = service.mattermost.get_me()
        bot = me.get("username")
        if not me.get("is_bot"):
            yield "problem", (f"BOT_TOKEN: @{bot} is a person, and would be the author of all "
                              "tickets: use the token of a bot account")
        teams = [str(team.get("name")) for team in service.mattermost.get_my_teams()]
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
    for channel_id in dict.fromkeys([service.settings.ticket_channel, *service.form.channels]):
        if channel_id:
            yield from channel_checks(service, channel_id, me)
    for mention in service.form.mentions:
        yield from mention_checks(service, mention)


def channel_checks(service: TicketService, channel_id: str, me: Json) -> Iterator[Check]:
    """Yield whether the bot may post in a channel that tickets go to, and who can read it."""
    name = service.channels.name_for_admin(channel_id)
    try:
        if obstacle := service.channels.join_or_obstacle(channel_id, me):
            yield "problem", service.channels.for_admin(
                obstacle, channel_id, str(me.get("username")))
            return
        yield "ok", f"{name}: @{me.get('username')} can post there"
        channel: Json = {}
        with contextlib.suppress(NotAllowed):  # who may post everywhere may not look everywhere
            channel = service.mattermost.get_channel(channel_id)
        if channel.get("type") in ("P", "G"):
            yield "warning", (f"{name}: it is private: people who are not in it can't read their "
                              "tickets, and are not told of replies")
        else:
            yield "note", (f"{name}: who is not in it is not told of replies to a ticket: people "
                           "have to join it")
    except MattermostError as error:
        yield "warning", f"{name}: it can't be looked at: {error}"


def mention_checks(service: TicketService, mention: str) -> Iterator[Check]:
    """Yield whether a mention of the form reaches nobody: then it is plain text, without a word."""
    if mention in CHANNEL_MENTIONS:
        return
    name = mention.removeprefix("@").rstrip(".")
    try:
        if service.mattermost.get_user_by_username(name.lower()).get("delete_at"):
            yield "warning", f"{service.form.source}: mention {mention}: this user is deactivated"
    except MattermostError as error:
        if error.status == 404 and error.by_mattermost:
            yield "warning", (f"{service.form.source}: mention {mention}: there is no such user "
                              "(fine if it is a user group)")
        else:
            yield "warning", f"{service.form.source}: mention {mention}: {error}"


def checks(service: TicketService, port: int) -> Iterator[Check]:
    """Yield all that an admin should know."""
    yield from (("note", f"{service.form.source}: {note}") for note in service.form.notes)
    yield from callback_checks(service.settings, port)
    yield "note", "SLASH_TOKEN: it can't be checked from here: type /ticket"
    for level, sentence in mattermost_checks(service):
        yield level, one_line(sentence)


def log_checks(service: TicketService, port: int) -> None:
    """Log what the admin should know; a Mattermost that is down is no reason to stop."""
    for level, sentence in checks(service, port):
        log.log(LEVELS[level], "%s", sentence)


def print_checks(settings: Settings) -> int:
    """Print what is fine and what is not; return the exit status."""
    service, levels = TicketService(settings), set()
    service.mattermost.command_waits = COMMAND_WAITS
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for level, sentence in checks(service, settings.port):
        levels.add(level)
        print(f"{level:8}{sentence}", flush=True)
    service.close()
    return 1 if "problem" in levels else 0


def health(environ: Environ) -> int:
    """Ask the service that runs on this machine whether it is well; return the exit status."""
    try:
        url = address_of(SETTINGS["listen_address"].read(environ), SETTINGS["port"].read(environ))
    except ValueError as error:
        print(f"LISTEN_ADDRESS or PORT {error}", file=sys.stderr)
        return 1
    if wrong := health_fault(url):
        print(f"no answer at {url}: {wrong}", file=sys.stderr)
        return 1
    return 0


def raise_file_limit() -> int:
    """Set the soft limit of open files to what we may need, up (it is often 1,024) or down."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    with contextlib.suppress(OSError, ValueError):  # macOS has a limit that it does not tell
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft if soft > 0 else FILES


def keep_serving(server: Server) -> None:
    """Run a server's loop; if a bug ends it, end the process, which could serve nobody any more."""
    try:
        server.serve_forever()
    finally:
        server.stopped.set()
        # Wakes sigwait() in run_service(); after a shutdown(), which comes behind it, does nothing.
        os.kill(os.getpid(), signal.SIGTERM)


def run_service(settings: Settings) -> int:
    """Run the service until SIGTERM or SIGINT; return the exit status."""
    service = TicketService(settings)
    try:
        server = Server(service, settings.listen_address, settings.port, raise_file_limit())
    except OSError as error:
        log.error("LISTEN_ADDRESS and PORT: %s:%d can't be opened: %s",
                  settings.listen_address, settings.port, error)
        return 1
    threading.Thread(target=keep_serving, args=(server,)).start()
    log.info("listening on port %d", server.server_port)
    threading.Thread(target=log_checks, args=(service, server.server_port), daemon=True).start()
    signal.sigwait(SIGNALS)
    has_failed = server.stopped.is_set()
    log.info("stopping")
    server.shutdown()
    service.close()
    return 1 if has_failed else 0


def say(sentence: str) -> None:
    """Print a sentence for the admin that is not the command's output."""
    print(sentence, file=sys.stderr, flush=True)


# --setup

BOT_NAME, TRIGGER_WORD = "ticket-bot", "ticket"
COMMAND = {
    "trigger": TRIGGER_WORD, "method": "P", "username": BOT_NAME, "display_name": "Ticket",
    "description": "Opens a form and posts a ticket", "auto_complete": True,
    "auto_complete_hint": "[what is wrong]", "auto_complete_desc": "File a ticket"}
TEAM_NAME_RE = re.compile("[a-z0-9-]{1,64}")
# What neither a shell nor systemd nor Podman reads otherwise in a file of settings.
PLAIN_URL_RE = re.compile(r"[\w:/.~%\[\]-]+", re.ASCII)


class SetUp:
    """Does by the API, as a System Admin, what has to be clicked in Mattermost. Twice is no harm.

    Every method may raise MattermostError or Problem.
    """

    def __init__(self, mattermost_url: str, callback_url: str, tls: ssl.SSLContext | None) -> None:
        self.mattermost_url, self.callback_url = mattermost_url, callback_url
        self.api = Mattermost(mattermost_url, "", tls)
        self.api.command_waits = COMMAND_WAITS

    def run(self, team_names: list[str], ask: Callable[[str], str]) -> list[str]:
        """Set up the bot, and a command in each team; return the lines of a file of settings.

        ask() gives the admin's user name, password and MFA code. All is looked at before anything
        is changed.
        """
        with self.api.retrying():  # so that nobody types a password for what is no Mattermost
            self.api.get_client_config()
        self.sign_in({"login_id": ask("user name"), "password": ask("password"), "token": ""}, ask)
        try:
            with self.api.retrying():
                return self.work([*dict.fromkeys(team_names)])
        except MattermostError as error:
            if error.status != 401 or not error.by_mattermost:
                raise
            raise Problem("Mattermost has ended the session: set up again, nothing is done twice"
                          ) from error
        finally:
            with contextlib.suppress(MattermostError):
                self.api.call("POST", "/users/logout", {})

    def work(self, team_names: list[str]) -> list[str]:
        """Look at everything, change what has to be, and return the lines."""
        if "system_admin" not in str(self.api.get_me().get("roles")).split():
            raise Problem("this account is no System Admin")
        config = self.api.call("GET", "/config").get("ServiceSettings")
        settings = config if isinstance(config, dict) else {}
        teams = [self.team(name) for name in team_names]
        bot = self.bot()
        commands = [self.command(team) for team in teams] if settings.get("EnableCommands") else []
        self.configure(settings)
        # Where commands were off, Mattermost did not list them: so only now.
        commands = commands or [self.command(team) for team in teams]
        bot_id = bot.get("id") or self.create_bot()
        tokens = [self.set_up_team(team, command, bot_id)
                  for team, command in zip(teams, commands, strict=True)]
        return [f"MATTERMOST_URL={self.mattermost_url}", f"CALLBACK_URL={self.callback_url}",
                f"BOT_TOKEN={self.create_token(bot_id)}", f"SLASH_TOKEN={','.join(tokens)}"]

    def sign_in(self, login: Json, ask: Callable[[str], str]) -> None:
        """Sign in: from here on, calls are made with the session's token."""
        try:
            with self.api.retrying():
                response = self.api.send("POST", "/api/v4/users/login", login)
        except MattermostError as error:
            wants_code = error.meaning == "code wanted" and not login["token"]
            if wants_code and (code := ask("MFA code")):
                self.sign_in({**login, "token": code}, ask)
                return
            if not error.by_mattermost or error.may_pass:
                raise
            raise Problem(
                "Mattermost does not let this account in: the user name, the password or the MFA "
                "code is wrong, or it signs in by SSO (then set it up by hand, as the README "
                f"says): {error}") from error
        session = matching(TOKEN_RE, response.headers.get("Token"))
        if not session:
            raise self.api.odd_answer()
        self.api.headers["Authorization"] = f"Bearer {session}"

    def team(self, name: str) -> Json:
        """Return a team."""
        with contextlib.suppress(NotAllowed):
            if TEAM_NAME_RE.fullmatch(name):
                return self.api.call_for_id("GET", f"/teams/name/{name}")
        raise Problem(f"there is no team {name!r:.80}: give the name in its URL")

    def bot(self) -> Json:
        """Return the bot, {} if there is none yet."""
        try:
            bot = self.api.get_user_by_username(BOT_NAME)
        except NotAllowed as error:
            if error.status != 404:
                raise
            return {}
        if not bot.get("is_bot"):
            raise Problem(f"the account {BOT_NAME} is a person's, and no bot: rename it")
        if bot.get("delete_at"):
            raise Problem(f"the bot {BOT_NAME} is disabled: enable it (Integrations › Bot "
                          "Accounts)")
        return bot

    def command(self, team: Json) -> Json:
        """Return a team's slash command, {} if there is none yet."""
        commands = self.api.call_for_list(
            "GET", f"/commands?team_id={team['id']}&custom_only=true")
        found = [command for command in commands if command.get("trigger") == TRIGGER_WORD
                 and command.get("team_id") == team["id"] and not command.get("delete_at")]
        if found and not str(found[0].get("url")).endswith("/ticket"):
            raise Problem(f"the team {team.get('name')} has another command "
                          f"/{TRIGGER_WORD}: it is left alone; delete or rename it")
        return found[0] if found else {}

    def configure(self, settings: Json) -> None:
        """Change what is not so yet in the configuration; say what can't be changed from here."""
        wanted: Json = {key: True for key in ("EnableBotAccountCreation", "EnableCommands")
                        if not settings.get(key)}
        # As Mattermost compares it: exactly, without a port, and IPv6 without brackets.
        host = re.sub(r":\d+$", "", urllib.parse.urlsplit(self.callback_url).netloc).strip("[]")
        allowed = str(settings.get("AllowedUntrustedInternalConnections") or "")
        if host not in re.split(r"[\s,]+", allowed):
            wanted["AllowedUntrustedInternalConnections"] = f"{allowed} {host}".strip()
        by_environment = self.api.call("GET", "/config/environment").get("ServiceSettings")
        fixed = {key: wanted.pop(key) for key in list(wanted)
                 if isinstance(by_environment, dict) and by_environment.get(key)}
        if wanted:
            patched = self.api.call("PUT", "/config/patch", {"ServiceSettings": wanted})
            now = patched.get("ServiceSettings")
            for key in list(wanted):
                if not isinstance(now, dict) or now.get(key) != wanted[key]:
                    fixed[key] = wanted.pop(key)
        for key, value in wanted.items():
            say(f"{key} is now {json.dumps(value)}")
        for key, value in fixed.items():
            say(f"warning: {key} can't be changed from here (an environment variable of "
                f"Mattermost's?): set it to {json.dumps(value)} there")

    def create_bot(self) -> str:
        """Return the ID of a new bot."""
        bot = self.api.call("POST", "/bots", {
            "username": BOT_NAME, "display_name": "Ticket bot", "description": "Posts tickets"})
        if not (bot_id := matching(ID_RE, bot.get("user_id"))):
            raise self.api.odd_answer()
        say(f"the bot {BOT_NAME} is there")
        return bot_id

    def set_up_team(self, team: Json, command: Json, bot_id: str) -> str:
        """Let the bot into a team, and return the token of its slash command there."""
        self.api.call("POST", f"/teams/{team['id']}/members",
                      {"team_id": team["id"], "user_id": bot_id})
        url = f"{self.callback_url}/ticket"
        if not command:
            command = self.api.call("POST", "/commands", {
                **COMMAND, "team_id": team["id"], "url": url})
        elif (command.get("url"), command.get("method")) != (url, COMMAND["method"]):
            command = self.api.call("PUT", f"/commands/{matching(ID_RE, command.get('id'))}",
                                    {**command, "url": url, "method": COMMAND["method"]})
        if not (token := matching(TOKEN_RE, command.get("token"))):
            raise self.api.odd_answer()
        say(f"the team {team.get('name')} has @{BOT_NAME} and /{TRIGGER_WORD}")
        return token

    def create_token(self, bot_id: str) -> str:
        """Return a new token of the bot's."""
        older = len(self.api.call_for_list("GET", f"/users/{bot_id}/tokens"))
        made = self.api.call("POST", f"/users/{bot_id}/tokens", {
            "description": f"ticket service, {utc_now():%Y-%m-%d}"})
        if not (token := matching(TOKEN_RE, made.get("token"))):
            raise self.api.odd_answer()
        if older:
            say(f"older tokens of @{BOT_NAME} stay as they are ({older}): delete those that "
                "nothing uses (Integrations › Bot Accounts)")
        return token


def asked_for(what: str) -> str:
    """Return what an admin types on the terminal, or the next line of standard input."""
    is_terminal = sys.stdin.isatty()
    if is_terminal and what == "password":
        return getpass.getpass("Password of the System Admin: ", sys.stderr)
    if is_terminal:
        print(f"{what[0].upper()}{what[1:]} of the System Admin: ", end="", file=sys.stderr,
              flush=True)
    return sys.stdin.readline().rstrip("\r\n")


def set_up(environ: Environ, team_names: list[str]) -> int:
    """Set up Mattermost, and print the settings for this service; return the exit status."""
    values, problems = read_settings(environ, {
        name: SETTINGS[name] for name in ("mattermost_url", "callback_url", "tls")})
    problems += [f"{SETTINGS[name].name} {value!r}: only letters, digits and :/.-_~% are possible"
                 for name, value in values.items()
                 if isinstance(value, str) and not PLAIN_URL_RE.fullmatch(value)]
    if problems:
        raise SettingsError("\n".join(problems))
    work = SetUp(**values)
    try:
        print("\n".join(work.run(team_names, asked_for)), flush=True)
    except (EOFError, UnicodeDecodeError) as error:
        raise Problem("standard input can't be read: user name, password and, if Mattermost "
                      "asks for it, MFA code are wanted, a line each") from error
    finally:
        work.api.connections.close()
    return 0


# --export and --remind

MAX_PAGE = 200
MAX_REMINDERS = 50  # at once: the first time may meet years
# How a cell begins that a spreadsheet works out.
FORMULA_RE = re.compile(r"\s*[=+\-@＝＋－＠]| *[\t\r]")
TICKET_COLUMNS = ("ticket", "status", "reporter", "created", "taken_by", "taken", "closed_by",
                  "closed", "channel", "link")


class Archive:
    """The tickets that there are, in the channels that they go to."""

    def __init__(self, settings: Settings) -> None:
        self.service = TicketService(settings)
        self.mattermost, self.form = self.service.mattermost, settings.form
        self.mattermost.command_waits = COMMAND_WAITS
        self.is_whole = True  # whether all channels could be read
        self.number = 0  # of tickets that were read
        self.page = MAX_PAGE  # posts that are listed at once

    def channels(self) -> Iterator[Json]:
        """Yield the channels that tickets go to: all that the bot is in, if the settings name none.

        Each has the key `full_name`, its team's name and its own.
        """
        with self.mattermost.retrying():
            teams = {matching(ID_RE, team.get("id")): team.get("name")
                     for team in self.mattermost.get_my_teams()}
            if ticket_channel := self.service.settings.ticket_channel:
                found = [self.channel(one)
                         for one in dict.fromkeys([ticket_channel, *self.form.channels])]
            else:
                found = [channel for team_id in teams if team_id
                         for channel in self.mattermost.get_my_channels(team_id)]
        seen = {channel["id"]: channel for channel in found if matching(ID_RE, channel.get("id"))
                and channel.get("type") != "D"}  # the bot makes no tickets in direct messages
        for channel in seen.values():
            team = teams.get(str(channel.get("team_id")))
            yield {**channel, "full_name": "/".join(
                str(part) for part in (team, channel.get("name")) if part)}

    def channel(self, channel_id: str) -> Json:
        """Return a channel, {} if the bot can't see it."""
        try:
            return self.mattermost.get_channel(channel_id)
        except NotAllowed as error:
            self.leave_out(channel_id, error)
            return {}

    def leave_out(self, channel: str, error: MattermostError) -> None:
        """Say that a channel could not be read."""
        self.is_whole = False
        say(f"channel {channel} is left out: {error}")

    def tickets(self, channel: Json) -> Iterator[tuple[Ticket, Json]]:
        """Yield the tickets of a channel, the newest first, and their posts."""
        before, self.page = "", MAX_PAGE
        try:
            while posts := self.posts(channel["id"], before):
                for post in posts:
                    ticket = Ticket.from_post(post)
                    if ticket and post.get("user_id") == self.mattermost.kept_bot_id:
                        self.count()
                        yield ticket, post
                last = matching(ID_RE, posts[-1].get("id"))
                if not last or last == before:
                    raise self.mattermost.odd_answer()
                before = last
        except NotAllowed as error:
            self.leave_out(channel["full_name"], error)

    def posts(self, channel_id: str, before: str) -> list[Json]:
        """Return root posts of a channel, fewer at once where they are long."""
        def page() -> list[Json]:
            while True:
                try:
                    self.mattermost.bot_id()  # for tickets(): here it is asked for again if need be
                    return self.mattermost.get_root_posts(channel_id, before, self.page)
                except AnswerTooLong:
                    if self.page == 1:
                        raise
                    self.page //= 2

        with self.mattermost.retrying():
            return self.mattermost.retried(page)

    def count(self) -> None:
        """Count a ticket, where somebody looks."""
        self.number += 1
        if sys.stderr.isatty() and self.number % 10 == 0:
            print(f"\r{self.number} tickets ", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End what is done for tickets, and the line of the counter."""
        self.service.close()
        if sys.stderr.isatty() and self.number >= 10:
            say("")


def time_in_utc(at: int) -> str:
    """Return a time of Mattermost's as 2026-11-29T10:00:00Z, "" for none."""
    with contextlib.suppress(OverflowError, ValueError, OSError):
        return in_utc(datetime.datetime.fromtimestamp(at / 1000, datetime.UTC)) if at else ""
    return ""


def ticket_cells(ticket: Ticket, channel: Json, link: str) -> dict[str, str]:
    """Return the cells of a ticket, but for the answers."""
    steps = [entry for entry in ticket.history if "edited" not in entry]
    taken = [entry for entry in steps if entry["status"] == TAKEN]
    closed = [entry for entry in steps if entry["status"] == ticket.status == CLOSED]
    created = whole_number(ticket.data.get("created_at"))
    return {
        "ticket": ticket.id, "status": ticket.status, "reporter": ticket.reporter.name,
        "created": time_in_utc(created),
        "taken_by": str(taken[-1].get("to", taken[-1]["by"])) if taken else "",
        "taken": time_in_utc(taken[0]["at"]) if taken else "",
        "closed_by": closed[-1]["by"] if closed else "",
        "closed": time_in_utc(closed[-1]["at"]) if closed else "",
        "channel": channel["full_name"], "link": link}


def in_words(answer: Any, element: Element | None, names: dict[str, str]) -> str:
    """Return an answer for a table, in the words of the form where it has them."""
    is_chosen = isinstance(element, OptionSelect) and all(
        isinstance(one, str) for one in listed(answer))  # one or several, whatever it is now
    if element and (is_chosen or element.fits(answer)):
        return element.words(answer, names)
    if isinstance(answer, bool):
        return YES if answer else NO
    return ", ".join(names.get(one, one) if isinstance(one, str) else json.dumps(one)
                     for one in listed(answer))


def as_cell(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    return f"'{text}" if FORMULA_RE.match(text) else text


def export(settings: Settings) -> int:
    """Print all tickets as CSV; return the exit status.

    https://www.rfc-editor.org/rfc/rfc4180
    """
    elements = {element.name: element for element in settings.form.elements}
    names, rows = list(elements), []
    with contextlib.closing(Archive(settings)) as archive:
        for channel in archive.channels():
            for ticket, _ in list(archive.tickets(channel))[::-1]:
                names += [name for name in ticket.answers if name not in names]
                link = archive.mattermost.link(ticket.post_id)
                rows.append((ticket_cells(ticket, channel, link), {
                    name: in_words(answer, elements.get(name), ticket.old_names)
                    for name, answer in ticket.answers.items()}))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace", newline="")
    table = csv.writer(sys.stdout)
    table.writerow(map(as_cell, [*TICKET_COLUMNS, *(
        f"form.{name}" if name in TICKET_COLUMNS else name for name in names)]))
    for cells, answers in rows:
        table.writerow(map(as_cell, [*cells.values(), *(answers.get(name, "") for name in names)]))
    sys.stdout.flush()
    return 0 if archive.is_whole else 1


def remind(settings: Settings, days: float) -> int:
    """Reply to open tickets in which nothing has happened for some days; return the exit status."""
    latest = milliseconds() - days * DAY * 1000
    with contextlib.closing(Archive(settings)) as archive:
        silent = [(news, ticket) for channel in archive.channels() if not channel.get("delete_at")
                  for ticket, post in archive.tickets(channel)
                  if (news := last_news(post)) < latest and is_to_be_solved(ticket)]
        silent.sort(key=lambda one: one[0])
        told, failed, closed_to_us = 0, 0, set()
        for number, (news, ticket) in enumerate(silent):
            if told == MAX_REMINDERS:
                say(f"{len(silent) - number} more are silent: the next run reminds of them")
                break
            if ticket.channel_id in closed_to_us:
                continue
            try:
                if remind_of(ticket, news, archive):
                    print(ticket.id, flush=True)
                    told += 1
            except NotAllowed as error:
                failed += 1
                say(f"{ticket.id} was not reminded of: {error}")
            except Problem as error:  # we can't post in its channel
                closed_to_us.add(ticket.channel_id)
                say(f"{ticket.id} and others there were not reminded of: {error.log}")
    return 1 if failed or closed_to_us or not archive.is_whole else 0


def remind_of(ticket: Ticket, news: int, archive: Archive) -> bool:
    """Reply to a ticket, unless something has happened in it since `news`; return whether."""
    mattermost = archive.mattermost
    mark = archive.service.seal.signatures("remind", f"{ticket.post_id} {news}")[0]
    with mattermost.retrying():
        if last_news(mattermost.retried(lambda: mattermost.get_post(ticket.post_id))) > news:
            return False
        archive.service.channels.reply(ticket.channel_id, ticket.post_id,
                                       reminder(ticket, news, archive.form.mention), mark)
    return True


def last_news(post: Json) -> int:
    """Return the time of the last change in a thread, in milliseconds."""
    return max(whole_number(post.get(key)) for key in ("create_at", "update_at", "last_reply_at"))


def is_to_be_solved(ticket: Ticket) -> bool:
    """Return whether somebody can still be given a ticket."""
    return ticket.status in STATUSES and HAND_OVER in STATUSES[ticket.status].steps


def reminder(ticket: Ticket, news: int, mention: str) -> str:
    """Return the reminder for a silent ticket."""
    who = f"@{ticket.status_by}" if ticket.status == TAKEN else mention
    day = time_in_utc(news)[:10]
    return REMINDER_TO.format(who=who, day=day) if who else REMINDER.format(day=day)


def days_in(text: str) -> float:
    """Return a number of days."""
    with contextlib.suppress(ValueError):
        if 0 < (days := float(text)) < float("inf"):
            return days
    raise SettingsError(f"--remind {text!r:.60}: must be a number of days, such as 3 or 0.5")


class Parser(argparse.ArgumentParser):
    """Reads the command line; what is wrong with it is one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise SettingsError: argparse itself would print how to use the program."""
        raise SettingsError(f"{message} (--help lists the options)")


def command_line() -> Parser:
    """Return the parser of the command line, which also tells of the settings."""
    variables = "\n".join(f"  {one.name:16}{one.meaning}" for one in SETTINGS.values())
    in_file = ", ".join(one.name for one in SETTINGS.values() if one.in_file)
    parser = Parser(
        description="A /ticket slash command for Mattermost. Without an option: run the service.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"environment variables:\n{variables}\n\n"
               f"A file can hold {in_file}:\nname it in BOT_TOKEN_FILE and so on.")
    options = parser.add_mutually_exclusive_group()
    options.add_argument("--check", action="store_true", help="check settings and Mattermost")
    options.add_argument("--health", action="store_true", help="ask the running service")
    options.add_argument("--setup", nargs="+", metavar="TEAM",
                         help="set up Mattermost for teams; print the settings")
    options.add_argument("--export", action="store_true", help="print all tickets as CSV")
    options.add_argument("--remind", metavar="DAYS",
                         help="reply to tickets in which nothing has happened for so long")
    return parser


def main(arguments: list[str], environ: Environ) -> int:
    """Do what the command line says; return the exit status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed at the start
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    try:
        return run(command_line().parse_args(arguments), environ)
    except SettingsError as error:
        say(str(error))
        return 2
    except Problem as error:
        say(str(error))
    except MattermostError as error:
        is_token = error.status == 401 and error.by_mattermost
        say(f"{'BOT_TOKEN' if is_token else 'MATTERMOST_URL'}: {error}")
    except KeyboardInterrupt:
        say("stopped")
    except OSError as error:  # standard output: it is full, or whoever reads has enough
        if not isinstance(error, BrokenPipeError):
            say(str(error))
    return 1


def run(chosen: argparse.Namespace, environ: Environ) -> int:
    """Do what was chosen on the command line; return the exit status."""
    if chosen.health:
        return health(environ)
    if chosen.setup:
        return set_up(environ, chosen.setup)
    days = 0 if chosen.remind is None else days_in(chosen.remind)
    is_command = chosen.check or chosen.export or days
    if not is_command:
        # Early, so that sigwait() in run_service() gets them: as PID 1, nothing else would end us.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    settings = Settings.from_environment(environ)
    if chosen.check:
        return print_checks(settings)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s",
                        datefmt="%Y-%m-%d %H:%M:%S%z")
    if chosen.export:
        return export(settings)
    return remind(settings, days) if days else run_service(settings)


def end(status: int) -> None:
    """End the process, though a thread may wait for a name server: sys.exit() would wait, too."""
    try:
        sys.stdout.flush()
    except OSError:  # as in main(): it has been said
        status = status or 1
    os._exit(status)


if __name__ == "__main__":
    end(main(sys.argv[1:], os.environ))
