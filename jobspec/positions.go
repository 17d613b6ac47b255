package jobspec

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"sort"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/nomad/api"
)

// Positions maps paths of a job, as in Fault.Path, to lines of its source.
type Positions map[string]int

// inherited matches blocks of a group or task that may stand in the job instead.
var inherited = regexp.MustCompile(`^group\..+?\.(?:task\..+?\.)?((?:update|reschedule|migrate|vault|secret)(?:\..*)?)$`)

// Line returns the line of path, or of the innermost block around it that the
// source shows; 0 when it shows none.
func (p Positions) Line(path string) int {
	if line, ok := p[path]; ok {
		return line
	}
	if m := inherited.FindStringSubmatch(path); m != nil {
		if line, ok := p[m[1]]; ok {
			return line
		}
	}
	for path != "" {
		cut := strings.LastIndexAny(path, ".[")
		if cut < 0 {
			break
		}
		path = path[:cut]
		if line, ok := p[path]; ok {
			return line
		}
	}
	return p[jobPath]
}

// jobPath is the path of the job as a whole.
const jobPath = "job"

// join appends a step to a path; steps directly in the job have no prefix.
func join(path, step string) string {
	if path == "" || path == jobPath {
		return step
	}
	return path + "." + step
}

// element is the path of the i-th of n blocks of one type without labels.
func element(path string, i, n int) string {
	if n == 1 {
		return path
	}
	return fmt.Sprintf("%s[%d]", path, i)
}

// add keeps the first line of a path.
func (p Positions) add(path string, line int) {
	if _, ok := p[path]; !ok {
		p[path] = line
	}
}

// positionsOf reads the positions out of a source without evaluating it; empty
// when it cannot be read.
func positionsOf(src []byte, format string) Positions {
	p := Positions{}
	if bounded("", src) != nil {
		return p
	}
	if format == FormatJSON || isJSON(src) {
		_ = jsonPositions(src, p) // unknown keys are for Parse to report
		return p
	}
	// A file with syntax errors still yields the blocks before the error.
	if file, _ := hclsyntax.ParseConfig(src, "", hcl.InitialPos); file != nil {
		hclPositions(file, p)
	}
	return p
}

func hclPositions(file *hcl.File, p Positions) {
	body, ok := file.Body.(*hclsyntax.Body)
	if !ok {
		return
	}
	for _, b := range body.Blocks {
		if b.Type == "job" {
			p.add(jobPath, b.TypeRange.Start.Line)
			p.body(b.Body, "")
		}
	}
}

func (p Positions) body(body *hclsyntax.Body, path string) {
	for name, a := range body.Attributes {
		at := join(path, name)
		p.add(at, a.NameRange.Start.Line)
		p.object(a.Expr, at)
	}
	seen := map[string]int{}
	for _, b := range body.Blocks {
		line := b.TypeRange.Start.Line
		if b.Type == "dynamic" && len(b.Labels) == 1 {
			p.add(join(path, b.Labels[0]), line)
			continue
		}
		at := join(path, strings.Join(append([]string{b.Type}, b.Labels...), "."))
		if path == "" && b.Type == "task" && len(b.Labels) == 1 {
			// A task directly in the job stands for a group of its name.
			group := "group." + b.Labels[0]
			p.add(group, line)
			at = group + "." + at
		}
		if len(b.Labels) == 0 {
			// Both forms: faults number blocks only where there are several.
			numbered := fmt.Sprintf("%s[%d]", at, seen[b.Type])
			seen[b.Type]++
			p.add(numbered, line)
			p.body(b.Body, numbered)
		}
		p.add(at, line)
		p.body(b.Body, at)
	}
}

// object adds the keys of `name = { key = … }`.
func (p Positions) object(e hclsyntax.Expression, path string) {
	o, ok := e.(*hclsyntax.ObjectConsExpr)
	if !ok {
		return
	}
	for _, item := range o.Items {
		key := hcl.ExprAsKeyword(item.KeyExpr)
		if k, ok := item.KeyExpr.(*hclsyntax.ObjectConsKeyExpr); ok && key == "" {
			if t, ok := k.Wrapped.(*hclsyntax.TemplateExpr); ok && t.IsStringLiteral() {
				v, _ := t.Value(nil)
				key = v.AsString()
			}
		}
		if key != "" {
			p.add(join(path, key), item.KeyExpr.Range().Start.Line)
		}
	}
}

// jsonWalk walks a JSON job beside the Go type it decodes into, whose hcl tags
// give the paths.
type jsonWalk struct {
	pos     Positions
	newline []int // offsets of the newlines
	unknown Faults
}

// jsonPositions adds the lines of a JSON job and returns its unknown keys as
// faults. The source must be valid JSON; where it is not, the walk ends early.
func jsonPositions(src []byte, p Positions) Faults {
	w := &jsonWalk{pos: p}
	for i, c := range src {
		if c == '\n' {
			w.newline = append(w.newline, i)
		}
	}
	body, base := src, 0
	if raw, at, ok := jobKey(src); ok {
		body, base = raw, at
	}
	p.add(jobPath, w.line(base))
	w.value(body, base, reflect.TypeFor[api.Job](), "")
	return w.unknown
}

func (w *jsonWalk) line(offset int) int { return sort.SearchInts(w.newline, offset) + 1 }

// jobKey returns the value of the key "Job" of a JSON object and its offset.
func jobKey(src []byte) (json.RawMessage, int, bool) {
	var found json.RawMessage
	at := 0
	members(src, func(key string, _ int, v json.RawMessage, offset int) {
		if key == "Job" {
			found, at = v, offset
		}
	})
	return found, at, found != nil
}

// members calls f for each key of a JSON object with the offsets of key and value
// within src.
func members(src []byte, f func(key string, keyAt int, value json.RawMessage, valueAt int)) {
	dec := json.NewDecoder(bytes.NewReader(src))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return
	}
	for dec.More() {
		t, err := dec.Token()
		key, ok := t.(string)
		if err != nil || !ok {
			return
		}
		keyAt := int(dec.InputOffset()) - 1
		var v json.RawMessage
		if dec.Decode(&v) != nil {
			return
		}
		f(key, keyAt, v, int(dec.InputOffset())-len(v))
	}
}

func (w *jsonWalk) value(raw json.RawMessage, base int, t reflect.Type, path string) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch t.Kind() {
	case reflect.Struct:
		members(raw, func(key string, keyAt int, v json.RawMessage, at int) {
			f, ok := fieldFold(t, key)
			if !ok {
				w.unknown = append(w.unknown, Fault{
					Path: orJob(path), Line: w.line(base + keyAt),
					Text: "unknown key " + quote(key) + didYouMean(key, fieldNames(t)),
				})
				return
			}
			step := join(path, hclName(f))
			if !labelled(f.Type) {
				w.pos.add(step, w.line(base+keyAt))
			}
			w.value(v, base+at, f.Type, step)
		})
	case reflect.Map:
		members(raw, func(key string, keyAt int, v json.RawMessage, at int) {
			w.pos.add(join(path, key), w.line(base+keyAt))
		})
	case reflect.Slice:
		dec := json.NewDecoder(bytes.NewReader(raw))
		if _, err := dec.Token(); err != nil {
			return
		}
		for i := 0; dec.More(); i++ {
			var v json.RawMessage
			if dec.Decode(&v) != nil {
				return
			}
			at := base + int(dec.InputOffset()) - len(v)
			if label, ok := jsonLabel(v, t.Elem()); ok {
				w.pos.add(join(path, label), w.line(at))
				w.value(v, at, t.Elem(), join(path, label))
				continue
			}
			numbered := fmt.Sprintf("%s[%d]", path, i)
			w.pos.add(numbered, w.line(at))
			w.value(v, at, t.Elem(), numbered)
			if i == 0 {
				w.value(v, at, t.Elem(), path)
			}
		}
	}
}

// jsonLabel returns the label of a block in JSON form, such as a group's Name.
func jsonLabel(raw json.RawMessage, t reflect.Type) (label string, ok bool) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	field, ok := labelField(t)
	if !ok {
		return "", false
	}
	members(raw, func(key string, _ int, v json.RawMessage, _ int) {
		if strings.EqualFold(key, field) {
			_ = json.Unmarshal(v, &label) // a label of the wrong type fails in the decoding proper
		}
	})
	return label, true
}

func orJob(path string) string {
	if path == "" {
		return jobPath
	}
	return path
}
