// SPDX-License-Identifier: MIT OR Apache-2.0
//! `help`. The synopses are interface; the words are ours.

use crate::command::{COMMANDS, Verb, find};
use crate::session::{Call, Done, Ran, Session};

impl Session {
    pub(crate) fn help(&mut self, c: Call<'_>) -> Ran {
        let Some(name) = c.args.first() else {
            for command in COMMANDS {
                self.output.out(&command.usage(command.name));
            }
            self.output
                .out("\nUse 'help commandname' for extended help.\n");
            return Ok(Done::Nothing);
        };
        let Some(command) = find(name) else {
            return self.fail(&format!("command {name} not found"));
        };
        self.output.out(&command.usage(name));
        if let Some(text) = extended(command.verb) {
            self.output.out(text);
        }
        Ok(Done::Nothing)
    }
}

fn extended(verb: Verb) -> Option<&'static str> {
    Some(match verb {
        Verb::Read => READ,
        Verb::Readv => READV,
        Verb::Write => WRITE,
        Verb::Writev => WRITEV,
        Verb::AioRead => AIO_READ,
        Verb::AioWrite => AIO_WRITE,
        Verb::Discard => DISCARD,
        Verb::Open => OPEN,
        Verb::Reopen => REOPEN,
        Verb::Sigraise => SIGRAISE,
        _ => return None,
    })
}

const READ: &str = "
 Reads a range, and reports how fast that was.

 Example:
 'read -v 512 1k' - dumps the kilobyte that begins at byte 512

 -b, -- read the VM state area instead of the disk
 -C, -- report in one line for machines
 -l, -- length of the part to verify, with -P
 -p, -- has no effect
 -P, -- verify that every byte is the given one
 -q, -- report nothing but errors
 -r, -- register the buffer with the I/O engine first
 -s, -- where the part to verify begins, with -P
 -v, -- dump what was read

";

const READV: &str = "
 Reads a range into one buffer for each length, in one request.

 Example:
 'readv -v 512 1k 1k' - dumps two kilobytes that begin at byte 512

 -C, -- report in one line for machines
 -P, -- verify that every byte is the given one
 -q, -- report nothing but errors
 -r, -- register the buffers with the I/O engine first
 -v, -- dump what was read

";

const WRITE: &str = "
 Writes a range with one byte value, with zeroes or from a file, and reports how fast that was.

 Example:
 'write -P 7 512 1k' - fills the kilobyte that begins at byte 512 with sevens

 -b, -- write the VM state area instead of the disk
 -c, -- store the data compressed
 -C, -- report in one line for machines
 -f, -- make the data durable before the request ends
 -n, -- with -z, fail rather than write zeroes slowly
 -p, -- has no effect
 -P, -- the byte to write (0xcd if not given)
 -q, -- report nothing but errors
 -r, -- register the buffer with the I/O engine first
 -s, -- take the data from a file, over and over if it is short
 -u, -- with -z, storage may be given back
 -z, -- write zeroes, without a buffer of them if possible

";

const WRITEV: &str = "
 Writes a range from one buffer for each length, in one request.

 Example:
 'writev 512 1k 1k' - writes two kilobytes that begin at byte 512

 -C, -- report in one line for machines
 -f, -- make the data durable before the request ends
 -P, -- the byte to write (0xcd if not given)
 -q, -- report nothing but errors
 -r, -- register the buffers with the I/O engine first

";

const AIO_READ: &str = "
 Starts a read and goes on with the next command. The report comes when the read has ended and the program waits for
 something: 'aio_flush' waits for all that was started.

 Example:
 'aio_read -v 512 1k 1k' - dumps two kilobytes that begin at byte 512, some time later

 -C, -- report in one line for machines
 -i, -- count a request that fails, and make none
 -P, -- verify that every byte is the given one
 -q, -- report nothing but errors
 -r, -- register the buffers with the I/O engine first
 -v, -- dump what was read

";

const AIO_WRITE: &str = "
 Starts a write and goes on with the next command. The report comes when the write has ended and the program waits for
 something: 'aio_flush' waits for all that was started.

 Example:
 'aio_write 512 1k 1k' - writes two kilobytes that begin at byte 512, some time later

 -C, -- report in one line for machines
 -f, -- make the data durable before the request ends
 -i, -- count a request that fails, and make none
 -P, -- the byte to write (0xcd if not given)
 -q, -- report nothing but errors
 -r, -- register the buffers with the I/O engine first
 -u, -- with -z, storage may be given back
 -z, -- write zeroes, without a buffer of them if possible

";

const DISCARD: &str = "
 Says that what a range holds is no longer needed.

 Example:
 'discard 512 1k' - gives back the kilobyte that begins at byte 512

 -C, -- report in one line for machines
 -q, -- report nothing but errors

";

const OPEN: &str = "
 Opens an image for the commands that follow.

 Example:
 'open -n -o driver=raw disk.img' - opens a raw image for writing, past the host's cache

 -r, -- read-only
 -s, -- let a temporary overlay take the writes
 -C, -- copy what is read from backing files to the image
 -n, -- bypass the host's cache, as -t none
 -U, -- take no locks
 -k, -- the kernel's asynchronous I/O, as -i native
 -i, -- the I/O engine: threads, native or io_uring
 -t, -- the cache mode
 -d, -- the discard mode
 -o, -- options of the block driver
";

const REOPEN: &str = "
 Changes how the open image is open, without closing it.

 Example:
 'reopen -r' - from now on nothing can be written

 -r, -- make it read-only
 -w, -- make it writable
 -c, -- the cache mode
 -o, -- options of the block driver

";

const SIGRAISE: &str = "
 Sends a signal to this program.

 Example:
 'sigraise 9' - ends the program as a crash would

";
