// SPDX-License-Identifier: MIT OR Apache-2.0
//! File names: protocol prefixes, and backing names relative to the overlay. `QEMU: path_has_protocol`, `path_combine`.

/// The protocol prefix of a name (`nbd` of `nbd:localhost`), if it has one: a colon before any slash.
pub fn protocol_of(name: &str) -> Option<&str> {
    let end = name.find([':', '/'])?;
    (name.as_bytes()[end] == b':').then(|| &name[..end])
}

/// Whether a name means the same wherever it is said: an absolute path, or one with a protocol.
pub fn is_absolute(name: &str) -> bool {
    name.starts_with('/') || protocol_of(name).is_some()
}

/// `name` as the image `overlay` says it: beside the overlay, unless it is absolute.
///
/// ```
/// use blockcore::name::resolve_beside;
/// assert_eq!(resolve_beside("dir/top.qcow2", "base.raw"), "dir/base.raw");
/// assert_eq!(resolve_beside("top.qcow2", "base.raw"), "base.raw");
/// assert_eq!(resolve_beside("dir/top.qcow2", "/a/base.raw"), "/a/base.raw");
/// ```
pub fn resolve_beside(overlay: &str, name: &str) -> String {
    if name.is_empty() || is_absolute(name) {
        return name.to_owned();
    }
    let prefix = protocol_of(overlay).map_or(0, |p| p.len() + 1);
    let dir_end = overlay[prefix..]
        .rfind('/')
        .map_or(prefix, |at| prefix + at + 1);
    format!("{}{name}", &overlay[..dir_end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_makes_a_protocol_only_before_any_slash() {
        assert_eq!(protocol_of("nbd:host:10809"), Some("nbd"));
        assert_eq!(protocol_of("./a:b"), None);
        assert_eq!(protocol_of("plain"), None);
        assert_eq!(resolve_beside("file:dir/x", "y"), "file:dir/y");
    }
}
