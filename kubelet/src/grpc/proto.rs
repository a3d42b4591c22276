//! Protobuf messages as Rust types: a list of `message Name { type field = number; … }` and `enum Name { Word = number; … }`.
//!
//! A field of an enumeration is written `enum Type field = number` and holds an `i32`, for senders may know more words than
//! we do; `Type::try_from` reads it. A field of a message is an `Option`, as its absence means something.

/// Declares messages and enumerations.
macro_rules! proto {
    ($($kind:ident $name:ident { $($body:tt)* })*) => {
        $($crate::grpc::proto_item!($kind $name { $($body)* });)*
    };
}

/// One of them.
macro_rules! proto_item {
    (message $name:ident { $($body:tt)* }) => { $crate::grpc::proto_message!(@ $name {} $($body)*); };
    (enum $name:ident { $($word:ident = $number:tt;)* }) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ::prost::Enumeration)]
        #[repr(i32)]
        #[allow(unreachable_pub, reason = "the caller says by its module how far its messages are seen")]
        pub enum $name { $($word = $number),* }
    };
}

/// The fields of a message, one after the other.
macro_rules! proto_message {
    (@ $name:ident { $($done:tt)* }) => {
        #[derive(Clone, PartialEq, ::prost::Message)]
        #[allow(unreachable_pub, reason = "the caller says by its module how far its messages are seen")]
        pub struct $name { $($done)* }
    };
    (@ $name:ident { $($done:tt)* } map<string, string> $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)*
            #[prost(btree_map = "string, string", tag = $tag)] pub $field: ::std::collections::BTreeMap<String, String>,
        } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } repeated string $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)*
            #[prost(string, repeated, tag = $tag)] pub $field: Vec<String>,
        } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } repeated int32 $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)*
            #[prost(int32, repeated, tag = $tag)] pub $field: Vec<i32>,
        } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } repeated int64 $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)*
            #[prost(int64, repeated, tag = $tag)] pub $field: Vec<i64>,
        } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } repeated enum $of:ident $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)*
            #[prost(int32, repeated, tag = $tag)] pub $field: Vec<i32>,
        } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } repeated $of:ident $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)*
            #[prost(message, repeated, tag = $tag)] pub $field: Vec<$of>,
        } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } map<string, $of:ident> $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)*
            #[prost(btree_map = "string, message", tag = $tag)] pub $field: ::std::collections::BTreeMap<String, $of>,
        } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } string $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)* #[prost(string, tag = $tag)] pub $field: String, } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } bytes $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)*
            #[prost(bytes = "vec", tag = $tag)] pub $field: Vec<u8>,
        } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } bool $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)* #[prost(bool, tag = $tag)] pub $field: bool, } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } int32 $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)* #[prost(int32, tag = $tag)] pub $field: i32, } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } int64 $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)* #[prost(int64, tag = $tag)] pub $field: i64, } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } uint32 $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)* #[prost(uint32, tag = $tag)] pub $field: u32, } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } uint64 $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)* #[prost(uint64, tag = $tag)] pub $field: u64, } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } double $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)* #[prost(double, tag = $tag)] pub $field: f64, } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } enum $of:ident $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)* #[prost(int32, tag = $tag)] pub $field: i32, } $($rest)*);
    };
    (@ $name:ident { $($done:tt)* } $of:ident $field:ident = $tag:tt; $($rest:tt)*) => {
        $crate::grpc::proto_message!(@ $name { $($done)*
            #[prost(message, optional, tag = $tag)] pub $field: Option<$of>,
        } $($rest)*);
    };
}

pub(crate) use {proto, proto_item, proto_message};

#[cfg(test)]
mod tests {
    use prost::Message;

    proto! {
        message Inner { int64 value = 1; }
        enum Colour { Red = 0; Green = 1; }
        message Outer {
            string name = 1;
            repeated string words = 2;
            map<string, string> labels = 3;
            Inner inner = 18;
            repeated Inner list = 19;
            enum Colour colour = 20;
            bool yes = 21;
        }
    }

    #[test]
    fn numbers_and_kinds_are_those_written() {
        let outer = Outer {
            name: "a".into(),
            words: vec!["b".into()],
            labels: [("k".to_owned(), "v".to_owned())].into(),
            inner: Some(Inner { value: 0 }),
            list: vec![Inner { value: 3 }],
            colour: Colour::Green as i32,
            yes: true,
        };
        // Tag and wire type of each field by the encoding's definition: `number << 3 | type`, as a varint.
        let wanted =
            b"\x0a\x01a\x12\x01b\x1a\x06\x0a\x01k\x12\x01v\x92\x01\x00\x9a\x01\x02\x08\x03\xa0\x01\x01\xa8\x01\x01";
        assert_eq!(outer.encode_to_vec(), wanted);
        assert_eq!(Outer::decode(&wanted[..]).expect("decodes"), outer);
        assert_eq!(Colour::try_from(1), Ok(Colour::Green));
    }
}
