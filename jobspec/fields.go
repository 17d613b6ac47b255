package jobspec

import (
	"reflect"
	"strings"
)

// The api package's structs carry the HCL name of each field in a tag
// (`hcl:"group,block"`); paths are made from them.

// hclName is the HCL name of a field; the Go name where it has none.
func hclName(f reflect.StructField) string {
	if f.Name == "ReservedPorts" {
		return "port" // in HCL a static port is a port block like any other
	}
	name, kind, _ := strings.Cut(f.Tag.Get("hcl"), ",")
	if kind == "label" || name == "" {
		return f.Name
	}
	return name
}

// labelField returns the name of the field that holds the label of a block type:
// Name of a group, Label of a port.
func labelField(t reflect.Type) (string, bool) {
	if t.Kind() != reflect.Struct {
		return "", false
	}
	for i := range t.NumField() {
		if f := t.Field(i); strings.HasSuffix(f.Tag.Get("hcl"), ",label") {
			return f.Name, true
		}
	}
	return "", false
}

// labelled says whether t is a list of blocks with labels.
func labelled(t reflect.Type) bool {
	if t.Kind() != reflect.Slice {
		return false
	}
	t = t.Elem()
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	_, ok := labelField(t)
	return ok
}

// fieldFold finds a field as encoding/json does: exact name, else any case.
func fieldFold(t reflect.Type, key string) (reflect.StructField, bool) {
	if f, ok := t.FieldByName(key); ok && f.IsExported() {
		return f, true
	}
	return t.FieldByNameFunc(func(name string) bool { return strings.EqualFold(name, key) })
}

func fieldNames(t reflect.Type) []string {
	names := make([]string, t.NumField())
	for i := range names {
		names[i] = t.Field(i).Name
	}
	return names
}
