"""As much of logind and systemd as a node asks for, on the host's bus. Lines `true` and `false` on standard input announce and
call off the host's end; what happens is told on standard output."""

import os
import sys
import threading

from jeepney import DBusAddress, HeaderFields, MessageType, new_method_return, new_signal
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import open_dbus_connection

MANAGER = DBusAddress("/org/freedesktop/login1", interface="org.freedesktop.login1.Manager")
properties = {"InhibitDelayMaxUSec": ("t", 5_000_000), "PreparingForShutdown": ("b", False)}


def tell(text):
    print(text, flush=True)


def announce(connection):
    for line in sys.stdin:
        ending = line.strip() == "true"
        properties["PreparingForShutdown"] = ("b", ending)
        connection.send(new_signal(MANAGER, "PrepareForShutdown", "b", (ending,)))


def follow(lock):
    os.read(lock, 1)
    os.close(lock)
    tell("released")


def read_settings():
    with open("/run/systemd/logind.conf.d/99-coracle.conf") as file:
        seconds = next(line.split("=")[1] for line in file if line.startswith("InhibitDelayMaxSec="))
    properties["InhibitDelayMaxUSec"] = ("t", int(seconds) * 1_000_000)
    tell(f"waits {int(seconds)}")


def answer(connection, call):
    member = call.header.fields[HeaderFields.member]
    if member == "Get":
        connection.send(new_method_return(call, "v", (properties[call.body[1]],)))
    elif member == "KillUnit":
        read_settings()
        connection.send(new_method_return(call))
    elif member == "Inhibit":
        what, who, _, mode = call.body
        ours, theirs = os.pipe()
        connection.send(new_method_return(call, "h", (theirs,)))
        os.close(theirs)
        tell(f"held {what} {who} {mode}")
        threading.Thread(target=follow, args=(ours,), daemon=True).start()


connection = open_dbus_connection("SYSTEM", enable_fds=True)
for name in ["org.freedesktop.login1", "org.freedesktop.systemd1"]:
    connection.send_and_get_reply(message_bus.RequestName(name))
threading.Thread(target=announce, args=(connection,), daemon=True).start()
while True:
    message = connection.receive()
    if message.header.message_type == MessageType.method_call:
        answer(connection, message)
