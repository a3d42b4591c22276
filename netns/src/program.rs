//! Programs of others that do a part of the work: iptables and CNI plugins.

use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

/// Runs a program that reads all of its input before it writes.
pub(crate) fn run(command: &mut Command, input: &[u8]) -> io::Result<Output> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let written = stdin.write_all(input);
    drop(stdin);
    let output = child.wait_with_output()?;
    // Who fails may not have read; why it failed is what counts.
    if output.status.success() { written.map(|()| output) } else { Ok(output) }
}
