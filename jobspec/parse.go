package jobspec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/nomad/api"
	"github.com/hashicorp/nomad/jobspec2"
)

// Bounds of a source. The parsers recurse, so that nesting and the number of
// operators (a chain of them is a deep tree) bound their stack.
const (
	MaxSource    = 1 << 20 // bytes
	maxDepth     = 64      // brackets and templates within each other
	maxOperators = 20_000
)

// Formats of a job's source, as job submissions name them.
const (
	FormatHCL  = "hcl2"
	FormatJSON = "json"
)

// ParseOptions are the inputs of a source besides its text.
type ParseOptions struct {
	// Vars are NAME=VALUE, as `-var` takes them.
	Vars []string
	// VarFiles are paths of variable files, read from this machine's disk.
	VarFiles []string
	// VarContent is the text of one more variable file.
	VarContent string
	// Env is an environment whose NOMAD_VAR_name entries set variables.
	Env []string
	// AllowFS lets the source read this machine's disk through file(), fileset()
	// and the like. Leave it false wherever the source is somebody else's.
	AllowFS bool
}

// Parse reads a job in HCL2 or JSON ({"Job": {…}}, or the job itself). name is the
// file's name for messages, and its folder what relative paths in HCL start at.
// The job comes as written: FromAPI fills in defaults and checks it. A bad source
// gives Faults, all that the parser found, each with file, line and column.
func Parse(name string, src []byte, o ParseOptions) (*api.Job, Positions, error) {
	if name == "" {
		name = "job"
	}
	if err := bounded(name, src); err != nil {
		return nil, nil, err
	}
	if isJSON(src) {
		return parseJSON(name, src)
	}
	return parseHCL(name, src, o)
}

// Submission describes a source to a server as `nomad job run` does, so that its
// faults carry lines there and the text can be had back. The variable files are
// read from this machine's disk.
func Submission(src []byte, o ParseOptions) (*api.JobSubmission, error) {
	s := &api.JobSubmission{Source: string(src), Format: FormatHCL}
	if isJSON(src) {
		s.Format = FormatJSON
		return s, nil
	}
	for _, v := range o.Vars {
		if k, v, ok := strings.Cut(v, "="); ok {
			if s.VariableFlags == nil {
				s.VariableFlags = map[string]string{}
			}
			s.VariableFlags[k] = v
		}
	}
	var files []string
	for _, path := range o.VarFiles {
		text, err := readBounded(path)
		if err != nil {
			return nil, fmt.Errorf("read variable file: %w", err)
		}
		files = append(files, text)
	}
	if o.VarContent != "" {
		files = append(files, o.VarContent)
	}
	s.Variables = strings.Join(files, "\n")
	return s, nil
}

func readBounded(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxSource+1))
	if err != nil {
		return "", err
	}
	return string(b), bounded(path, b)
}

func isJSON(src []byte) bool {
	src = bytes.TrimLeft(src, " \t\r\n")
	return len(src) > 0 && src[0] == '{'
}

func parseJSON(name string, src []byte) (*api.Job, Positions, error) {
	at := func(offset int64) string {
		offset = min(max(offset, 0), int64(len(src)))
		before := src[:offset]
		return fmt.Sprintf("%s:%d,%d: ", name, 1+bytes.Count(before, []byte("\n")), len(before)-bytes.LastIndexByte(before, '\n'))
	}
	bad := func(offset int64, format string, args ...any) (*api.Job, Positions, error) {
		return nil, nil, Faults{{Text: at(offset) + fmt.Sprintf(format, args...)}}
	}
	body, base := json.RawMessage(src), 0
	if raw, offset, ok := jobKey(src); ok {
		body, base = raw, offset
	}
	job := &api.Job{}
	if err := json.Unmarshal(src, new(json.RawMessage)); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			return bad(syntax.Offset, "not valid JSON: %v", err)
		}
		return bad(0, "not valid JSON: %v", err)
	}
	if err := json.Unmarshal(body, job); err != nil {
		var wrong *json.UnmarshalTypeError
		if errors.As(err, &wrong) {
			return bad(int64(base)+wrong.Offset, "%s holds a JSON %s, which is no %s", wrong.Field, wrong.Value, jsonWant(wrong))
		}
		return bad(int64(base), "%v", err)
	}
	p := Positions{}
	if unknown := jsonPositions(src, p); len(unknown) > 0 {
		return nil, p, unknown
	}
	return job, p, nil
}

func jsonWant(e *json.UnmarshalTypeError) string {
	if e.Type.String() == "time.Duration" {
		return "number of nanoseconds"
	}
	return e.Type.Kind().String()
}

func parseHCL(name string, src []byte, o ParseOptions) (job *api.Job, p Positions, err error) {
	file, diags := hclsyntax.ParseConfig(src, name, hcl.InitialPos)
	if diags.HasErrors() {
		return nil, nil, diagnosed(diags)
	}
	for _, path := range o.VarFiles {
		text, err := readBounded(path)
		if err != nil {
			return nil, nil, fmt.Errorf("read variable file: %w", err)
		}
		if _, diags := hclsyntax.ParseConfig([]byte(text), path, hcl.InitialPos); diags.HasErrors() && !isJSON([]byte(text)) {
			return nil, nil, diagnosed(diags)
		}
	}
	if err := bounded("variables", []byte(o.VarContent)); err != nil {
		return nil, nil, err
	}
	// The decoder turns values into Go by reflection and panics on a few odd ones
	// (a null within a list of maps); to the user that is a source it cannot read.
	defer func() {
		if r := recover(); r != nil {
			job, p, err = nil, nil, Faults{{Path: jobPath, Line: 1, Text: fmt.Sprintf("the HCL decoder cannot read this source: %v", r)}}
		}
	}()
	job, err = jobspec2.ParseWithConfig(&jobspec2.ParseConfig{
		Path: name, Body: src, AllowFS: o.AllowFS, Strict: true,
		ArgVars: o.Vars, VarFiles: o.VarFiles, VarContent: o.VarContent, Envs: o.Env,
	})
	if err != nil {
		if errors.As(err, &diags) {
			return nil, nil, diagnosed(diags)
		}
		return nil, nil, textual(name, err)
	}
	p = Positions{}
	hclPositions(file, p)
	return job, p, nil
}

func diagnosed(diags hcl.Diagnostics) error {
	var fs Faults
	for _, d := range diags {
		if d.Severity != hcl.DiagError {
			continue
		}
		f := Fault{Text: d.Error()}
		if d.Subject != nil {
			f.Line = d.Subject.Start.Line
		}
		fs = append(fs, f)
	}
	return fs.At(nil)
}

// textual splits the decoder's joined diagnostics, one a line that starts with
// FILE:LINE,COLUMN, into faults.
func textual(name string, err error) error {
	start := regexp.MustCompile(`^` + regexp.QuoteMeta(name) + `:(\d+),`)
	var fs Faults
	for _, text := range strings.Split(err.Error(), "\n") {
		m := start.FindStringSubmatch(text)
		if m == nil && len(fs) > 0 && !strings.HasPrefix(text, "<nil>") {
			fs[len(fs)-1].Text += " " + text // a message of several lines
			continue
		}
		f := Fault{Text: strings.TrimPrefix(text, "<nil>: ")}
		if m != nil {
			f.Line, _ = strconv.Atoi(m[1])
		}
		fs = append(fs, f)
	}
	return fs.At(nil)
}

// bounded refuses a source that the recursive parsers should not be given.
func bounded(name string, src []byte) error {
	if len(src) > MaxSource {
		return Faults{{Text: fmt.Sprintf("%s: %d bytes; a job may have at most %d", name, len(src), MaxSource)}}
	}
	depth := hclNesting
	if isJSON(src) {
		depth = jsonNesting
	}
	line, operators := depth(src)
	switch {
	case line > 0:
		return Faults{{Line: line, Text: fmt.Sprintf("%s:%d: nested more than %d deep", name, line, maxDepth)}}
	case operators > maxOperators:
		return Faults{{Text: fmt.Sprintf("%s: more than %d operators", name, maxOperators)}}
	}
	return nil
}

// hclNesting lexes, which needs no stack, and returns the line where nesting gets
// too deep, 0 for none, and the number of operators.
func hclNesting(src []byte) (line, operators int) {
	tokens, _ := hclsyntax.LexConfig(src, "", hcl.InitialPos)
	depth := 0
	for _, t := range tokens {
		switch t.Type {
		case hclsyntax.TokenOBrace, hclsyntax.TokenOParen, hclsyntax.TokenOQuote, hclsyntax.TokenOHeredoc,
			hclsyntax.TokenTemplateInterp, hclsyntax.TokenTemplateControl:
			depth++
		case hclsyntax.TokenOBrack:
			depth++
			operators++
		case hclsyntax.TokenCBrace, hclsyntax.TokenCParen, hclsyntax.TokenCBrack, hclsyntax.TokenCQuote,
			hclsyntax.TokenCHeredoc, hclsyntax.TokenTemplateSeqEnd:
			depth--
		case hclsyntax.TokenStar, hclsyntax.TokenSlash, hclsyntax.TokenPlus, hclsyntax.TokenMinus, hclsyntax.TokenPercent,
			hclsyntax.TokenEqualOp, hclsyntax.TokenNotEqual, hclsyntax.TokenLessThan, hclsyntax.TokenLessThanEq,
			hclsyntax.TokenGreaterThan, hclsyntax.TokenGreaterThanEq, hclsyntax.TokenAnd, hclsyntax.TokenOr,
			hclsyntax.TokenBang, hclsyntax.TokenQuestion, hclsyntax.TokenDot:
			operators++
		}
		if depth > maxDepth {
			return t.Range.Start.Line, operators
		}
	}
	return 0, operators
}

func jsonNesting(src []byte) (line, operators int) {
	depth, inString := 0, false
	for i := 0; i < len(src); i++ {
		switch c := src[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return 1 + bytes.Count(src[:i], []byte("\n")), 0
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return 0, 0
}
