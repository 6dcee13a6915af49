//! The macro that turns the key table into types: one declaration gives the field, its parser and
//! its documentation.

/// `section: Type { key: type = kind, default, pod }` for every setting; see `keys.rs`.
macro_rules! settings {
    ($(
        $(#[doc = $section_doc:literal])+
        $section:ident: $Section:ident {
            $(
                $(#[doc = $doc:literal])+
                $key:ident: $type:ty = $kind:expr, $default:expr, $pod:ident;
            )+
        }
    )+) => {
        /// Every setting, typed and in range.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Settings { $( $(#[doc = $section_doc])+ pub $section: $Section, )+ }

        $(
            $(#[doc = $section_doc])+
            #[derive(Clone, Debug, PartialEq)]
            pub struct $Section { $( $(#[doc = $doc])+ pub $key: $type, )+ }
        )+

        /// The sections in the order of the table, each with its documentation.
        pub const SECTIONS: &[(&str, &str)] =
            &[$( (stringify!($section), concat!($($section_doc),+)) ),+];

        /// The table.
        pub const KEYS: &[Key] = &[$($(
            Key {
                path: concat!(stringify!($section), ".", stringify!($key)),
                section: stringify!($section),
                name: stringify!($key),
                doc: concat!($($doc),+),
                kind: $kind,
                default: $default,
                pod_may_override: pod!($pod),
            }
        ),+),+];

        impl Settings {
            /// The typed form of one checked value per key.
            pub(crate) fn of(value: impl Fn(&'static str) -> Value) -> Self {
                Self { $(
                    $section: $Section { $(
                        $key: <$type as Setting>::of(&value(concat!(
                            stringify!($section), ".", stringify!($key)
                        )))
                        .expect("each row of the table pairs a kind with that kind's type"),
                    )+ },
                )+ }
            }
        }
    };
}

/// `pod` or `node`: may an annotation override the key.
macro_rules! pod {
    (pod) => {
        true
    };
    (node) => {
        false
    };
}

pub(crate) use {pod, settings};
