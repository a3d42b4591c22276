//! `mkimage TAG ARCHIVE ENTRYPOINT FILE=/PATH…`: a container image from programs of the host, without any builder.
#![forbid(unsafe_code)]

use std::path::Path;

use coracle_testkit::Image;

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [tag, archive, entrypoint, files @ ..] = &arguments[..] else {
        return Err(std::io::Error::other("usage: mkimage TAG ARCHIVE ENTRYPOINT FILE=/PATH…"));
    };
    let files = files
        .iter()
        .map(|pair| {
            pair.split_once('=')
                .map(|(source, target)| (source.into(), target.into()))
                .ok_or_else(|| std::io::Error::other(format!("not of the form FILE=/PATH: {pair}")))
        })
        .collect::<Result<_, _>>()?;
    Image { tag: tag.clone(), files, entrypoint: vec![entrypoint.clone()], ..Image::default() }
        .write(Path::new(archive))
}
