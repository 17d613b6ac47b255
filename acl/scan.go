package acl

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Bounds of a policy's text.
const (
	// MaxRules bounds it, in bytes.
	MaxRules = 256 << 10
	// maxNesting bounds its braces; the language needs three.
	maxNesting = 16
)

// token is a piece of text: an identifier, a string, or a sign, which is its own kind.
type token struct {
	kind byte // one of the signs, or tokIdent, tokString, tokEnd
	text string
	line int
}

const (
	tokIdent  = 'i'
	tokString = 's'
	tokEnd    = 0
	signs     = "{}[],=:"
)

func (t token) String() string {
	switch t.kind {
	case tokEnd:
		return "the end"
	case tokString:
		return strconv.Quote(t.text)
	}
	return t.text
}

// scanner cuts a policy's text into tokens.
type scanner struct {
	rest string
	line int
}

// next gives the next token, or what is wrong with the text there.
func (s *scanner) next() (token, *Fault) {
	if f := s.blank(); f != nil {
		return token{}, f
	}
	if s.rest == "" {
		return token{kind: tokEnd, line: s.line}, nil
	}
	c := s.rest[0]
	switch {
	case strings.IndexByte(signs, c) >= 0:
		return s.take(c, 1), nil
	case c == '"':
		return s.quoted()
	case isIdent(c):
		n := 1
		for n < len(s.rest) && isIdent(s.rest[n]) {
			n++
		}
		return s.take(tokIdent, n), nil
	case strings.HasPrefix(s.rest, "<<"):
		return token{}, s.fault("a heredoc cannot stand in a policy: write a string in quotes")
	}
	r, _ := utf8.DecodeRuneInString(s.rest)
	return token{}, s.fault("unexpected character %q", r)
}

func isIdent(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-' || c == '.'
}

func (s *scanner) fault(format string, args ...any) *Fault {
	return &Fault{Line: s.line, Text: fmt.Sprintf(format, args...)}
}

func (s *scanner) take(kind byte, n int) token {
	t := token{kind: kind, text: s.rest[:n], line: s.line}
	s.rest = s.rest[n:]
	return t
}

// blank skips white space and comments.
func (s *scanner) blank() *Fault {
	for s.rest != "" {
		switch c := s.rest[0]; {
		case c == '\n':
			s.line++
			s.rest = s.rest[1:]
		case c == ' ' || c == '\t' || c == '\r':
			s.rest = s.rest[1:]
		case c == '#' || strings.HasPrefix(s.rest, "//"):
			n := strings.IndexByte(s.rest, '\n')
			if n < 0 {
				n = len(s.rest)
			}
			s.rest = s.rest[n:]
		case strings.HasPrefix(s.rest, "/*"):
			n := strings.Index(s.rest[2:], "*/")
			if n < 0 {
				return s.fault("the comment that begins here does not end")
			}
			s.line += strings.Count(s.rest[:n+4], "\n")
			s.rest = s.rest[n+4:]
		default:
			return nil
		}
	}
	return nil
}

// quoted reads a string with the escapes that HCL and JSON share.
func (s *scanner) quoted() (token, *Fault) {
	n := 1
	for ; n < len(s.rest) && s.rest[n] != '"' && s.rest[n] != '\n'; n++ {
		if s.rest[n] == '\\' {
			n++
		}
	}
	if n >= len(s.rest) || s.rest[n] != '"' {
		return token{}, s.fault("the string that begins here does not end on its line")
	}
	t := s.take(tokString, n+1)
	text, err := strconv.Unquote(strings.ReplaceAll(t.text, `\/`, `/`))
	if err != nil || !utf8.ValidString(text) {
		return token{}, &Fault{Line: t.line, Text: fmt.Sprintf("string %s cannot be read: use UTF-8 and the escapes of HCL", clip(t.text))}
	}
	t.text = text
	return t, nil
}

// clip bounds what a fault repeats of a policy.
func clip(s string) string {
	const most = 80 // bytes
	if len(s) > most {
		s = s[:most] + "…"
	}
	return s
}

// item is `key "label"… { items }`, `key = "text"` or `key = ["text"…]`; JSON's
// colons and quoted keys mean the same.
type item struct {
	line  int
	keys  []string
	body  []*item // of an object
	texts []string
	form  byte // '{' an object, '[' a list of strings, 's' a string
	cut   bool // a fault of syntax is within: what it lacks may stand behind it
}

// parser reads items off tokens.
type parser struct {
	scanner
	ahead  token
	syntax *Fault // the first one; nothing is read after it
}

// parse reads a whole text, up to the first fault of syntax.
func parse(text string) ([]*item, *Fault) {
	p := &parser{scanner: scanner{rest: text, line: 1}}
	p.advance()
	var items []*item
	if p.ahead.kind == '{' { // JSON
		p.advance()
		items = p.items('}', 0)
		p.expect('}')
		p.expect(tokEnd)
	} else {
		items = p.items(tokEnd, 0)
	}
	return items, p.syntax
}

func (p *parser) advance() {
	if p.syntax != nil {
		return
	}
	p.ahead, p.syntax = p.next()
	if p.syntax != nil {
		p.ahead = token{kind: tokEnd, line: p.syntax.Line}
	}
}

func (p *parser) unexpected(want string) {
	if p.syntax == nil {
		p.syntax = &Fault{Line: p.ahead.line, Text: fmt.Sprintf("expected %s, got %s", want, clip(p.ahead.String()))}
	}
}

func (p *parser) expect(kind byte) {
	if p.ahead.kind != kind {
		want := string(kind)
		if kind == tokEnd {
			want = "the end"
		}
		p.unexpected(want)
		return
	}
	if kind != tokEnd {
		p.advance()
	}
}

// items reads items until the closing token, which it leaves.
func (p *parser) items(end byte, depth int) []*item {
	var out []*item
	if depth > maxNesting && p.syntax == nil {
		p.syntax = &Fault{Line: p.ahead.line, Text: fmt.Sprintf("braces are nested more than %d deep", maxNesting)}
	}
	for p.syntax == nil && p.ahead.kind != end {
		if p.ahead.kind != tokIdent && p.ahead.kind != tokString {
			p.unexpected("the name of a block or attribute")
			break
		}
		out = append(out, p.item(depth)...)
		if p.ahead.kind == ',' {
			p.advance()
		}
	}
	return out
}

// item reads one item; a list of objects, which JSON needs for blocks of a kind,
// makes several.
func (p *parser) item(depth int) []*item {
	it := &item{line: p.ahead.line}
	for p.ahead.kind == tokIdent || p.ahead.kind == tokString {
		it.keys = append(it.keys, p.ahead.text)
		p.advance()
	}
	if p.ahead.kind == '=' || p.ahead.kind == ':' {
		p.advance()
		if p.ahead.kind == tokString {
			it.form, it.texts = 's', []string{p.ahead.text}
			p.advance()
			return []*item{it}
		}
		if p.ahead.kind == '[' {
			return p.list(it, depth)
		}
	}
	if p.ahead.kind != '{' {
		p.unexpected(`a block in { }, or = and a string in quotes or a list of strings in [ ]`)
		return nil
	}
	it.object(p, depth)
	return []*item{it}
}

func (it *item) object(p *parser, depth int) {
	p.expect('{')
	it.form, it.body = '{', p.items('}', depth+1)
	p.expect('}')
	it.cut = p.syntax != nil
}

func (p *parser) list(it *item, depth int) []*item {
	it.form = '['
	var objects []*item
	p.expect('[')
	for p.syntax == nil && p.ahead.kind != ']' {
		switch p.ahead.kind {
		case tokString:
			it.texts = append(it.texts, p.ahead.text)
			p.advance()
		case '{':
			o := &item{line: p.ahead.line, keys: it.keys}
			o.object(p, depth)
			objects = append(objects, o)
		default:
			p.unexpected("a string in quotes or ]")
		}
		if p.ahead.kind != ']' {
			p.expect(',')
		}
	}
	p.expect(']')
	if objects == nil {
		return []*item{it}
	}
	if it.texts != nil && p.syntax == nil {
		p.syntax = &Fault{Line: it.line, Text: "a list holds either strings or objects"}
	}
	return objects
}
