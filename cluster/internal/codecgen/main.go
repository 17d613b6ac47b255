// Command codecgen writes cluster/codec_gen.go: straight-line encoding, decoding and copying of all records and
// commands. What it writes has the same bytes as the reflecting codec gives, which the tests of cluster hold against it.
//
// Run `go generate ./cluster` after a change of any of these types. It begins by emptying the old file; cluster reflects
// then, so that this program builds with the types as they are now.
package main

import (
	"bytes"
	"cmp"
	"fmt"
	"go/format"
	"os"
	"reflect"
	"slices"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

func main() {
	if err := generate(); err != nil {
		fmt.Fprintln(os.Stderr, "codecgen:", err)
		os.Exit(1)
	}
}

// generate makes an error of what the generator panics with.
func generate() (err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("%v", fault)
		}
	}()
	g := &generator{funcs: map[reflect.Type]string{}, records: map[reflect.Type]bool{}, packed: map[reflect.Type]bool{}, stored: map[reflect.Type]bool{}}
	var roots []reflect.Type
	for _, t := range cluster.Tables {
		r := reflect.TypeOf(t.New()).Elem()
		roots = append(roots, r)
		g.records[r] = true
	}
	for kind := range 256 {
		if c, err := cluster.DecodeCommand([]byte{byte(kind), 0x80}); err == nil {
			roots = append(roots, reflect.TypeOf(c).Elem())
		}
	}
	for _, r := range roots {
		g.add(r, "")
	}
	for _, name := range []string{"TaskStates", "Metrics"} { // what allocations keep packed
		f, _ := reflect.TypeFor[cluster.Allocation]().FieldByName(name)
		g.addPacked(f.Type)
	}
	g.addStored(reflect.TypeFor[cluster.Allocation]())
	g.addStored(reflect.TypeFor[cluster.Evaluation]())
	g.addStored(reflect.TypeFor[cluster.Deployment]())
	g.addStored(reflect.TypeFor[cluster.ApplyPlans]())
	g.addStored(reflect.TypeFor[cluster.UpdateAllocs]())
	slices.SortFunc(g.types, func(a, b reflect.Type) int { return cmp.Compare(g.funcs[a], g.funcs[b]) })
	g.file()
	out, err := format.Source(g.out.Bytes())
	if err != nil {
		panic(fmt.Errorf("%w\n%s", err, g.out.Bytes()))
	}
	return os.WriteFile(os.Args[1], out, 0o644) //nolint:gosec // source code
}

type generator struct {
	out     bytes.Buffer
	types   []reflect.Type          // structs, all that the roots reach
	funcs   map[reflect.Type]string // the last part of their functions' names
	records map[reflect.Type]bool   // kept one by one in tables: each is allocated on its own
	packed  map[reflect.Type]bool
	stored  map[reflect.Type]bool // have a short form, in snapshots and entries
}

func (g *generator) p(format string, args ...any) { fmt.Fprintf(&g.out, format+"\n", args...) }

// add takes in a type and what it reaches; path names a struct that has no name.
func (g *generator) add(t reflect.Type, path string) {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		g.add(t.Elem(), path)
	case reflect.Struct:
		if g.funcs[t] != "" {
			return
		}
		name := t.Name()
		if name == "" {
			name = path
		}
		g.funcs[t] = strings.ToUpper(name[:1]) + name[1:]
		g.types = append(g.types, t)
		for _, f := range fields(t) {
			g.add(f.Type, g.funcs[t]+f.Name)
		}
	}
}

func (g *generator) addPacked(t reflect.Type) {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		g.addPacked(t.Elem())
	case reflect.Struct:
		g.packed[t] = true
		for _, f := range fields(t) {
			g.addPacked(f.Type)
		}
	}
}

// addStored takes in a type and what it reaches but the packed types.
func (g *generator) addStored(t reflect.Type) {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		g.addStored(t.Elem())
	case reflect.Struct:
		if !g.packed[t] {
			g.stored[t] = true
			for _, f := range fields(t) {
				g.addStored(f.Type)
			}
		}
	}
}

// field is a struct's field, those of embedded structs included.
type field struct {
	reflect.StructField
	key       string
	omitEmpty bool
}

// fields are the stored fields by key.
func fields(t reflect.Type) (list []field) {
	for i := range t.NumField() {
		f := t.Field(i)
		switch {
		case f.Anonymous:
			list = append(list, fields(f.Type)...)
		case f.IsExported():
			key, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			if key == "" {
				key = f.Name
			}
			list = append(list, field{f, key, strings.Contains(options, "omitempty")})
		}
	}
	slices.SortFunc(list, func(a, b field) int { return strings.Compare(a.key, b.key) })
	for i := 1; i < len(list); i++ {
		if list[i].key == list[i-1].key {
			panic(fmt.Sprintf("%s has two fields %s", t, list[i].key))
		}
	}
	return list
}

// storedFields are the fields in the short form, by key: also the unexported ones with a tag that names their key.
func storedFields(t reflect.Type) []field {
	list := fields(t)
	for i := range t.NumField() {
		if key := t.Field(i).Tag.Get("stored"); key != "" {
			list = append(list, field{t.Field(i), key, true})
		}
	}
	slices.SortFunc(list, func(a, b field) int { return strings.Compare(a.key, b.key) })
	return list
}

// inOrder are the fields as they are declared: the packed form knows them by their places.
func inOrder(t reflect.Type) []field {
	list := fields(t)
	slices.SortFunc(list, func(a, b field) int { return slices.Compare(a.Index, b.Index) })
	return list
}

// name is how the source of package cluster writes a type.
func name(t reflect.Type) string { return strings.ReplaceAll(t.String(), "cluster.", "") }

func (g *generator) file() {
	g.p("// Code generated by codecgen; DO NOT EDIT.\n\npackage cluster\n\nimport (\"encoding/json\"; \"time\")")
	g.p("// When this does not compile a type has changed: run `go generate ./cluster`.\nvar (")
	for _, t := range g.types {
		if t.Name() != "" {
			g.p("_ = %s(%s)", name(t), literal(t))
		}
	}
	g.p(")")
	g.p("// appendRecord appends v's stored form; false when v is of a type without generated code.")
	g.p("func appendRecord(b []byte, v any) ([]byte, bool) {\nswitch v := v.(type) {")
	g.cases("return append%[2]s(b, v), true")
	g.p("}\nreturn b, false\n}")
	g.p("// decodeRecord reads what appendRecord wrote into v; false when v is of a type without generated code.")
	g.p("func decodeRecord(d *decoder, v any) bool {\nswitch v := v.(type) {")
	g.cases("decode%[2]s(d, v)")
	g.p("default: return false\n}\nreturn true\n}")
	g.p("// copyRecord makes a deep copy; nil when v is of a type without generated code.")
	g.p("func copyRecord(v any) any {\nswitch v := v.(type) {")
	g.cases("return copyPtr(v, copy%[2]s)")
	g.p("}\nreturn nil\n}")
	for _, t := range g.types {
		g.encoder(t)
		g.decoder(t)
		g.copier(t)
		if g.packed[t] {
			g.packer(t)
		}
		if g.stored[t] {
			g.storer(t)
		}
	}
}

func (g *generator) cases(do string) {
	for _, t := range g.types {
		if t.Name() != "" {
			g.p("case *%[1]s: "+do, name(t), g.funcs[t])
		}
	}
}

// literal is the type as an anonymous struct's zero value: it converts to the type
// only while their fields are the same.
func literal(t reflect.Type) string {
	var b strings.Builder
	b.WriteString("struct{")
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.Anonymous {
			b.WriteString(f.Name + " ")
		}
		b.WriteString(name(f.Type) + "; ")
	}
	return b.String() + "}{}"
}

// quote writes a key as msgpack's string.
func quote(key string) string {
	if len(key) > 31 {
		panic(fmt.Sprintf("key %s is longer than 31 bytes", key))
	}
	return fmt.Sprintf("\"\\x%02x\" + %q", 0xa0+len(key), key)
}

func (g *generator) encoder(t reflect.Type) {
	list := fields(t)
	g.p("\nfunc append%s(b []byte, v *%s) []byte {\nif v == nil { return append(b, 0xc0) }", g.funcs[t], name(t))
	if _, ok := reflect.PointerTo(t).MethodByName("Whole"); ok {
		g.p("v = v.Whole()")
	}
	always := 0
	var optional []field
	for _, f := range list {
		if f.omitEmpty {
			optional = append(optional, f)
		} else {
			always++
		}
	}
	if len(optional) == 0 {
		g.p("b = appendMapLen(b, %d)", always)
	} else {
		g.p("n := %d", always)
		for _, f := range optional {
			g.p("if %s { n++ }", filled(f))
		}
		g.p("b = appendMapLen(b, n)")
	}
	for _, f := range list {
		line := fmt.Sprintf("b = %s", g.encode(f.Type, fmt.Sprintf("append(b, %s...)", quote(f.key)), "v."+f.Name))
		if f.omitEmpty {
			line = fmt.Sprintf("if %s { %s }", filled(f), line)
		}
		g.p("%s", line)
	}
	g.p("return b\n}")
}

func filled(f field) string {
	v := "v." + f.Name
	switch f.Type.Kind() {
	case reflect.Pointer:
		return v + " != nil"
	case reflect.String:
		return v + ` != ""`
	case reflect.Bool:
		return v
	case reflect.Slice, reflect.Map:
		return "len(" + v + ") > 0"
	case reflect.Int, reflect.Int64, reflect.Uint64, reflect.Uint16:
		return v + " != 0"
	}
	panic(fmt.Sprintf("omitempty on %s", f.Type))
}

// plain gives v as its basic type.
func plain(t reflect.Type, basic, v string) string {
	if t.String() == basic {
		return v
	}
	return basic + "(" + v + ")"
}

// encode is the expression that appends v to b.
func (g *generator) encode(t reflect.Type, b, v string) string {
	switch t.Kind() {
	case reflect.String:
		return fmt.Sprintf("appendStr(%s, %s)", b, plain(t, "string", v))
	case reflect.Bool:
		return fmt.Sprintf("appendBool(%s, %s)", b, v)
	case reflect.Int, reflect.Int64:
		return fmt.Sprintf("appendInt(%s, %s)", b, plain(t, "int64", v))
	case reflect.Uint, reflect.Uint64, reflect.Uint32, reflect.Uint16:
		return fmt.Sprintf("appendUint(%s, %s)", b, plain(t, "uint64", v))
	case reflect.Struct:
		return fmt.Sprintf("append%s(%s, &%s)", g.funcs[t], b, v)
	case reflect.Pointer:
		if t.Elem().Kind() == reflect.Struct {
			return fmt.Sprintf("append%s(%s, %s)", g.funcs[t.Elem()], b, v)
		}
		return fmt.Sprintf("appendPtr(%s, %s, %s)", b, v, g.encodeFunc(t.Elem()))
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return fmt.Sprintf("appendBin(%s, %s)", b, v)
		}
		return fmt.Sprintf("appendList(%s, %s, %s)", b, v, g.encodeFunc(t.Elem()))
	case reflect.Map:
		if t.Key().Kind() == reflect.String {
			return fmt.Sprintf("appendMap(%s, %s, %s)", b, v, g.encodeFunc(t.Elem()))
		}
	}
	panic(fmt.Sprintf("no encoding for %s", t))
}

// encodeFunc is the function that appends an element.
func (g *generator) encodeFunc(t reflect.Type) string {
	switch {
	case t.Kind() == reflect.Pointer && t.Elem().Kind() == reflect.Struct:
		return "append" + g.funcs[t.Elem()]
	case t == reflect.TypeFor[string]():
		return "appendStr"
	case t == reflect.TypeFor[bool]():
		return "appendBool"
	case t == reflect.TypeFor[int64]():
		return "appendInt"
	case t == reflect.TypeFor[uint64]():
		return "appendUint"
	}
	return fmt.Sprintf("func(b []byte, v %s) []byte { return %s }", name(t), g.encode(t, "b", "v"))
}

func (g *generator) decoder(t reflect.Type) {
	g.p("\nvar keysOf%s = []string{", g.funcs[t])
	for _, f := range storedFields(t) {
		g.p("%q,", f.key)
	}
	g.p("}")
	g.p("\nfunc decode%[1]s(d *decoder, v *%[2]s) {\nnext := 0\nfor n := d.mapLen(); n > 0; n-- {\nswitch d.field(keysOf%[1]s, &next) {", g.funcs[t], name(t))
	for i, f := range storedFields(t) {
		g.p("case %d: // %s", i, f.key)
		if !f.IsExported() {
			g.p("v.%s = d.packed(&%sShape)", f.Name, f.Name)
		} else if f.Type.Kind() == reflect.Struct {
			g.p("decode%s(d, &v.%s)", g.funcs[f.Type], f.Name)
		} else {
			read := g.decode(f.Type, f.Name)
			if key := f.Name + map[bool]string{true: "/map"}[f.Name == "Tasks" && f.Type.Kind() == reflect.Map]; shared[key] {
				read = fmt.Sprintf("decodeShared(d, func(d *decoder) %s { return %s })", name(f.Type), read)
			}
			g.p("v.%s = %s", f.Name, read)
		}
	}
	g.p("default: d.skip()\n}\n}\n}")
}

// shared names the fields whose values many records have alike, and no rule changes in place.
var shared = map[string]bool{
	"RestartPolicy": true, "ReschedulePolicy": true, "EphemeralDisk": true, "Update": true, "Migrate": true, "LogConfig": true,
	"Resources": true, "Constraints": true, "Datacenters": true, "Env": true, "Meta": true, "QueuedAllocations": true,
	"Tasks/map": true, "Attributes": true, "Summary": true,
}

// unique names the strings that are not worth sharing: each is seen once.
var unique = map[string]bool{"RequestID": true, "Source": true, "EmbeddedTmpl": true}

// decode is the expression that reads a value.
func (g *generator) decode(t reflect.Type, fieldName string) string {
	switch t.Kind() {
	case reflect.String:
		if unique[fieldName] {
			return "d.text()"
		}
		if t.String() != "string" {
			return name(t) + "(d.str())"
		}
		return "d.str()"
	case reflect.Bool:
		return "d.bool()"
	case reflect.Int, reflect.Int64:
		if t.String() == "int64" {
			return "d.int()"
		}
		return name(t) + "(d.int())"
	case reflect.Uint64:
		return "d.uint()"
	case reflect.Uint:
		return name(t) + "(d.uint())"
	case reflect.Uint16:
		return "d.uint16()"
	case reflect.Pointer:
		return fmt.Sprintf("decodePtr(d, %s)", g.decodeInto(t.Elem()))
	case reflect.Slice:
		e := t.Elem()
		switch {
		case e.Kind() == reflect.Uint8:
			return "d.bin()"
		case e.Kind() == reflect.Pointer && g.records[e.Elem()]:
			return fmt.Sprintf("decodeEach(d, %s)", g.decodeInto(e.Elem()))
		case e.Kind() == reflect.Pointer:
			return fmt.Sprintf("decodeBlock(d, %s)", g.decodeInto(e.Elem()))
		}
		return fmt.Sprintf("decodeList(d, %s)", g.decodeInto(e))
	case reflect.Map:
		return fmt.Sprintf("decodeMap(d, %s)", g.decodeInto(t.Elem()))
	}
	panic(fmt.Sprintf("no decoding for %s", t))
}

// decodeInto is the function that reads a value into a pointer.
func (g *generator) decodeInto(t reflect.Type) string {
	if t.Kind() == reflect.Struct {
		return "decode" + g.funcs[t]
	}
	return fmt.Sprintf("func(d *decoder, v *%s) { *v = %s }", name(t), g.decode(t, ""))
}

func (g *generator) copier(t reflect.Type) {
	g.p("\nfunc copy%s(v *%s) {", g.funcs[t], name(t))
	for _, f := range fields(t) {
		if f.Type.Kind() == reflect.Struct {
			if !flat(f.Type) {
				g.p("copy%s(&v.%s)", g.funcs[f.Type], f.Name)
			}
		} else if !flat(f.Type) {
			g.p("v.%[1]s = %[2]s", f.Name, g.copy(f.Type, "v."+f.Name))
		}
	}
	g.p("}")
}

// flat says whether an assignment copies all of a value.
func flat(t reflect.Type) bool {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		return false
	case reflect.Struct:
		return !slices.ContainsFunc(fields(t), func(f field) bool { return !flat(f.Type) })
	}
	return true
}

// copy is the expression for a deep copy of v.
func (g *generator) copy(t reflect.Type, v string) string {
	deep := "nil"
	if t.Kind() != reflect.Struct && !flat(t.Elem()) {
		deep = g.copyFunc(t.Elem())
	}
	switch t.Kind() {
	case reflect.Pointer:
		return fmt.Sprintf("copyPtr(%s, %s)", v, deep)
	case reflect.Slice:
		return fmt.Sprintf("copyList(%s, %s)", v, deep)
	case reflect.Map:
		return fmt.Sprintf("copyMap(%s, %s)", v, deep)
	}
	panic(fmt.Sprintf("no copy of %s", t))
}

// copyFunc is the function that makes a shallow copy behind a pointer deep.
func (g *generator) copyFunc(t reflect.Type) string {
	if t.Kind() == reflect.Struct {
		return "copy" + g.funcs[t]
	}
	return fmt.Sprintf("func(v *%s) { *v = %s }", name(t), g.copy(t, "*v"))
}

func (g *generator) packer(t reflect.Type) {
	list := inOrder(t)
	g.p("\nfunc pack%s(p *packer, v *%s) {\np.uint(%d)", g.funcs[t], name(t), len(list))
	for _, f := range list {
		g.p("%s", g.pack(f, "v."+f.Name))
	}
	g.p("}\n\nfunc unpack%s(u *unpacker, v *%s) {\nn := u.uint()", g.funcs[t], name(t))
	for i, f := range list {
		g.p("if n > %d { v.%s = %s }", i, f.Name, g.unpack(f))
	}
	g.p("}")
}

// storer writes the function that appends the short form, without what is zero.
func (g *generator) storer(t reflect.Type) {
	list := storedFields(t)
	g.p("\nfunc store%s(b []byte, v *%s) []byte {\nif v == nil { return append(b, 0xc0) }\nb, at, n := storeMap(b, %d)", g.funcs[t], name(t), len(list))
	for _, f := range list {
		v, key := "v."+f.Name, fmt.Sprintf("append(b, %s...)", quote(f.key))
		switch {
		case !f.IsExported():
			g.p(`if %s != "" { b = appendBytes(%s, %s); n++ }`, v, key, v)
		case f.Type.Kind() == reflect.Struct:
			g.p("if c := store%s(%s, &%s); len(c) > len(b)+%d { b = c; n++ }", g.funcs[f.Type], key, v, len(f.key)+2)
		case f.Type.Kind() == reflect.Slice || f.Type.Kind() == reflect.Map:
			g.p("if %s != nil { b = %s; n++ }", v, g.store(f.Type, key, v))
		default:
			g.p("if %s { b = %s; n++ }", filled(f), g.store(f.Type, key, v))
		}
	}
	g.p("return storeMapEnd(b, at, n)\n}")
}

// store is encode for the short form.
func (g *generator) store(t reflect.Type, b, v string) string {
	switch {
	case t.Kind() == reflect.Pointer && g.stored[t.Elem()]:
		return fmt.Sprintf("store%s(%s, %s)", g.funcs[t.Elem()], b, v)
	case t.Kind() == reflect.Slice && g.stored[t.Elem()]:
		return fmt.Sprintf("appendList(%s, %s, func(b []byte, v %s) []byte { return store%s(b, &v) })", b, v, name(t.Elem()), g.funcs[t.Elem()])
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Pointer && g.stored[t.Elem().Elem()]:
		return fmt.Sprintf("appendList(%s, %s, store%s)", b, v, g.funcs[t.Elem().Elem()])
	case t.Kind() == reflect.Map && t.Elem().Kind() == reflect.Pointer && g.stored[t.Elem().Elem()]:
		return fmt.Sprintf("appendMap(%s, %s, store%s)", b, v, g.funcs[t.Elem().Elem()])
	}
	return g.encode(t, b, v)
}

// moment says whether a field is a time, of which records have many that lie close together.
func moment(f field) bool { return f.Type == reflect.TypeFor[cluster.Time]() || f.Name == "Time" }

// pack is the statement that packs v.
func (g *generator) pack(f field, v string) string {
	t := f.Type
	switch t.Kind() {
	case reflect.String:
		return fmt.Sprintf("p.str(%s)", plain(t, "string", v))
	case reflect.Bool:
		return fmt.Sprintf("p.bool(%s)", v)
	case reflect.Int, reflect.Int64:
		if moment(f) {
			return fmt.Sprintf("p.moment(%s)", plain(t, "int64", v))
		}
		return fmt.Sprintf("p.int(%s)", plain(t, "int64", v))
	case reflect.Uint64:
		return fmt.Sprintf("p.uint(%s)", plain(t, "uint64", v))
	case reflect.Pointer:
		return fmt.Sprintf("packPtr(p, %s, pack%s)", v, g.funcs[t.Elem()])
	case reflect.Slice:
		return fmt.Sprintf("packList(p, %s, %s)", v, g.packFunc(t.Elem()))
	case reflect.Map:
		return fmt.Sprintf("packMap(p, %s, %s)", v, g.packFunc(t.Elem()))
	}
	panic(fmt.Sprintf("no packing of %s", t))
}

func (g *generator) packFunc(t reflect.Type) string {
	return fmt.Sprintf("func(p *packer, v %s) { %s }", name(t), g.pack(field{StructField: reflect.StructField{Type: t}}, "v"))
}

// unpack is the expression for a packed value.
func (g *generator) unpack(f field) string {
	t := f.Type
	switch t.Kind() {
	case reflect.String:
		return strings.ReplaceAll(name(t)+"(u.str())", "string(u.str())", "u.str()")
	case reflect.Bool:
		return "u.bool()"
	case reflect.Int, reflect.Int64:
		if moment(f) {
			return strings.ReplaceAll(name(t)+"(u.moment())", "int64(u.moment())", "u.moment()")
		}
		return strings.ReplaceAll(name(t)+"(u.int())", "int64(u.int())", "u.int()")
	case reflect.Uint64:
		return "u.uint()"
	case reflect.Pointer:
		return fmt.Sprintf("unpackPtr(u, unpack%s)", g.funcs[t.Elem()])
	case reflect.Slice:
		return fmt.Sprintf("unpackList(u, %s)", g.unpackFunc(t.Elem()))
	case reflect.Map:
		return fmt.Sprintf("unpackMap(u, %s)", g.unpackFunc(t.Elem()))
	}
	panic(fmt.Sprintf("no unpacking of %s", t))
}

func (g *generator) unpackFunc(t reflect.Type) string {
	return fmt.Sprintf("func(u *unpacker) %s { return %s }", name(t), g.unpack(field{StructField: reflect.StructField{Type: t}}))
}
