//! The options of containerd's runtime handler: which configuration this pod's shim reads.
//!
//! containerd sends `runtimeoptions.v1.Options` (containerd
//! `api/types/runtimeoptions/v1/api.proto`): `config_path` (2) when the handler names one, else its
//! whole `options` table as TOML in `config_body` (3). Before 2.3 the message comes inside an `Any`
//! on the stdin of `start`, from 2.3 on as an extension of the bootstrap parameters. Other types
//! are other shims'.

use std::path::PathBuf;

use containerd_shim_protos::protobuf::{CodedInputStream, Message, well_known_types::any::Any};
use pericarp_runtime_config::RuntimeOptions;

/// The message's full name, with whatever prefix its sender uses.
const TYPE_NAME: &str = "runtimeoptions.v1.Options";

/// What is wrong with the options.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OptionsError {
    #[error("the options of containerd's runtime handler cannot be decoded: {0}")]
    Decode(#[from] protobuf::Error),
    #[error("the options of containerd's runtime handler are not UTF-8")]
    Text,
    #[error("{0}")]
    Content(String),
}

/// Reads the options out of `any`; those of other types are none.
pub(crate) fn of_any(any: &Any) -> Result<RuntimeOptions, OptionsError> {
    if !any.type_url.ends_with(TYPE_NAME) {
        return Ok(RuntimeOptions::default());
    }
    let mut path = String::new();
    let mut body = Vec::new();
    let mut input = CodedInputStream::from_bytes(&any.value);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        // Field number and wire type 2, "length-delimited" (protobuf encoding, "Message
        // Structure").
        match tag {
            0x12 => path = input.read_string()?,
            0x1a => body = input.read_bytes()?,
            _ => {
                let wire_type = containerd_shim_protos::protobuf::rt::WireType::new(tag & 7);
                let wire_type = wire_type.ok_or(OptionsError::Text)?;
                input.skip_field(wire_type)?;
            }
        }
    }
    let body = String::from_utf8(body).map_err(|_| OptionsError::Text)?;
    let mut options =
        RuntimeOptions::parse(&body).map_err(|error| OptionsError::Content(error.to_string()))?;
    if !path.is_empty() {
        options.config_path = Some(PathBuf::from(path));
    }
    Ok(options)
}

/// Reads what older versions send on stdin.
pub(crate) fn of_stdin(input: &[u8]) -> Result<RuntimeOptions, OptionsError> {
    if input.is_empty() {
        return Ok(RuntimeOptions::default());
    }
    of_any(&Any::parse_from_bytes(input)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(fields: &[(u8, &str)]) -> Any {
        let mut value = Vec::new();
        for (tag, text) in fields {
            value.push(*tag);
            value.push(u8::try_from(text.len()).unwrap());
            value.extend(text.as_bytes());
        }
        Any {
            type_url: format!("types.googleapis.com/{TYPE_NAME}"),
            value,
            ..Default::default()
        }
    }

    #[test]
    fn path_and_body_are_read() {
        let options = of_any(&any(&[
            (0x0a, "x"),
            (0x12, "/etc/p.toml"),
            (0x1a, "Flavour = 'gpu'"),
        ]))
        .unwrap();
        assert_eq!(options.config_path, Some("/etc/p.toml".into()));
        assert_eq!(options.flavour.as_deref(), Some("gpu"));
    }

    #[test]
    fn others_options_are_none_and_garbage_is_an_error() {
        let mut other = any(&[(0x12, "/x")]);
        other.type_url = "containerd.runc.v1.Options".into();
        assert_eq!(of_any(&other).unwrap(), RuntimeOptions::default());
        assert!(of_any(&any(&[(0x1a, "Flavor = 'x'")])).is_err());
        let torn = Any {
            type_url: TYPE_NAME.into(),
            value: vec![0x12, 9, b'x'],
            ..Default::default()
        };
        assert!(of_any(&torn).is_err());
        assert_eq!(of_stdin(&[]).unwrap(), RuntimeOptions::default());
    }
}
