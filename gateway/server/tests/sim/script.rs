//! Lua scripts of a simulated Redis: the real scripts, run by a real Lua 5.1.
//!
//! Each thread has one Lua, which compiles each script once. While a script runs, the data it works
//! on is in the thread as well.

use std::{cell::RefCell, collections::HashMap};

use bytes::Bytes;
use mlua::{Function, Lua, LuaString, MultiValue, Table, Value};
use sha1::{Digest as _, Sha1};

use super::{
    commands::{ServerData, execute},
    resp::Reply,
};

thread_local! {
    static LUA: ScriptEngine = ScriptEngine::new();
    static DATA: RefCell<ServerData> = RefCell::default();
}

struct ScriptEngine {
    lua: Lua,
    compiled: RefCell<HashMap<String, Function>>,
}

/// The error of a command, on its way through Lua.
#[derive(Debug)]
struct LuaCommandError(String);

impl std::fmt::Display for LuaCommandError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for LuaCommandError {}

/// The name of a script: its SHA-1 in hexadecimal digits.
pub fn name_of(text: &[u8]) -> String {
    format!("{:x}", Sha1::digest(text))
}

/// Compiles a script, unless it was compiled before.
pub fn load(text: &[u8]) -> Result<String, String> {
    let name = name_of(text);
    LUA.with(|scripts| {
        if !scripts.compiled.borrow().contains_key(&name) {
            // The flags only matter to a Redis that can be full.
            let flags = match text.strip_prefix(b"#!") {
                Some(_) => text.iter().position(|byte| *byte == b'\n').unwrap_or_default(),
                None => 0,
            };
            let chunk = scripts.lua.load(&text[flags..]).set_name("@user_script");
            let script = chunk.into_function().map_err(|error| error.to_string())?;
            scripts.compiled.borrow_mut().insert(name.clone(), script);
        }
        Ok(name)
    })
}

/// Runs a script that was loaded.
pub fn run(data: &mut ServerData, name: &str, keys: &[Bytes], args: &[Bytes]) -> Reply {
    DATA.set(std::mem::take(data));
    let reply = LUA.with(|scripts| scripts.run(name, keys, args));
    *data = DATA.take();
    reply
}

impl ScriptEngine {
    fn new() -> Self {
        let lua = Lua::new();
        let build = || -> mlua::Result<()> {
            let redis = lua.create_table()?;
            redis.set("call", lua.create_function(call)?)?;
            redis.set("pcall", lua.create_function(pcall)?)?;
            let error_reply = |lua: &Lua, text: LuaString| {
                // An error text of one word has no code.
                let bare = !text.as_bytes().contains(&b' ');
                let text = [if bare { &b"ERR "[..] } else { b"" }, &text.as_bytes()].concat();
                field_table(lua, "err", &lua.create_string(text)?)
            };
            redis.set("error_reply", lua.create_function(error_reply)?)?;
            let status_reply = |lua: &Lua, text: LuaString| field_table(lua, "ok", &text);
            redis.set("status_reply", lua.create_function(status_reply)?)?;
            lua.globals().set("redis", redis)
        };
        build().expect("a fresh Lua takes tables and functions");
        Self { lua, compiled: RefCell::default() }
    }

    fn run(&self, name: &str, keys: &[Bytes], args: &[Bytes]) -> Reply {
        let script = self.compiled.borrow().get(name).cloned();
        let Some(script) = script else {
            return Reply::Error("NOSCRIPT No matching script. Please use EVAL.".to_owned());
        };
        let call = || -> mlua::Result<Value> {
            let table = |words: &[Bytes]| {
                let words = words.iter().map(|word| self.lua.create_string(word));
                self.lua.create_sequence_from(words.collect::<mlua::Result<Vec<_>>>()?)
            };
            self.lua.globals().set("KEYS", table(keys)?)?;
            self.lua.globals().set("ARGV", table(args)?)?;
            script.call(())
        };
        match call() {
            Ok(value) => answer(&value),
            Err(error) => Reply::Error(format!("{} script: {name}", text_of(&error))),
        }
    }
}

fn field_table(lua: &Lua, field: &str, text: &LuaString) -> mlua::Result<Table> {
    let table = lua.create_table()?;
    table.set(field, text)?;
    Ok(table)
}

/// `redis.call`.
fn call(lua: &Lua, args: MultiValue) -> mlua::Result<Value> {
    let mut words = Vec::with_capacity(args.len());
    for arg in args {
        words.push(match arg {
            Value::String(text) => Bytes::copy_from_slice(&text.as_bytes()),
            Value::Integer(number) => number.to_string().into(),
            // As C prints it with 17 digits: integers have no decimal point.
            Value::Number(number) => number.to_string().into(),
            _ => {
                let text = "ERR Lua redis lib command arguments must be strings or integers";
                return Err(mlua::Error::external(LuaCommandError(text.to_owned())));
            }
        });
    }
    let outcome = DATA.with_borrow_mut(|data| execute(data, &words));
    match outcome {
        Ok(reply) => to_lua(lua, &reply),
        Err(failure) => Err(mlua::Error::external(LuaCommandError(failure.0))),
    }
}

/// `redis.pcall`: returns an error as a table.
fn pcall(lua: &Lua, args: MultiValue) -> mlua::Result<Value> {
    call(lua, args).or_else(|error| {
        let text = lua.create_string(text_of(&error))?;
        Ok(Value::Table(field_table(lua, "err", &text)?))
    })
}

/// Converts a reply for a script, as RESP2 has it.
fn to_lua(lua: &Lua, reply: &Reply) -> mlua::Result<Value> {
    Ok(match reply {
        Reply::Int(number) => Value::Number(*number as f64),
        Reply::Bulk(bytes) | Reply::Verbatim(bytes) => Value::String(lua.create_string(bytes)?),
        Reply::Null => Value::Boolean(false),
        Reply::Status(text) => {
            Value::Table(field_table(lua, "ok", &lua.create_string(text.as_bytes())?)?)
        }
        Reply::Error(text) => return Err(mlua::Error::external(LuaCommandError(text.clone()))),
        Reply::Array(items) | Reply::Push(items) => {
            let table = lua.create_table_with_capacity(items.len(), 0)?;
            for item in items {
                table.raw_push(to_lua(lua, item)?)?;
            }
            Value::Table(table)
        }
        Reply::Map(pairs) => {
            let table = lua.create_table_with_capacity(pairs.len() * 2, 0)?;
            for (key, value) in pairs {
                table.raw_push(to_lua(lua, key)?)?;
                table.raw_push(to_lua(lua, value)?)?;
            }
            Value::Table(table)
        }
    })
}

/// Converts the result of a script for a client.
fn answer(value: &Value) -> Reply {
    match value {
        Value::String(text) => Reply::bulk(text.as_bytes()),
        Value::Integer(number) => Reply::Int(*number),
        Value::Number(number) => Reply::Int(*number as i64),
        Value::Boolean(true) => Reply::Int(1),
        Value::Table(table) => {
            if let Ok(Some(text)) = table.raw_get::<Option<String>>("err") {
                return Reply::Error(text);
            }
            if let Ok(Some(_)) = table.raw_get::<Option<String>>("ok") {
                return Reply::Status("OK");
            }
            let mut items = Vec::new();
            for at in 1.. {
                match table.raw_get::<Value>(at) {
                    Ok(Value::Nil) | Err(_) => break,
                    Ok(item) => items.push(answer(&item)),
                }
            }
            Reply::Array(items)
        }
        _ => Reply::Null,
    }
}

/// The text of an error: of a command, or Lua's own.
fn text_of(error: &mlua::Error) -> String {
    match error {
        mlua::Error::CallbackError { cause, .. } => text_of(cause),
        mlua::Error::ExternalError(raised) => raised.to_string(),
        other => format!("ERR {}", other.to_string().lines().next().unwrap_or_default()),
    }
}
