package api

import (
	"fmt"
	"strings"

	"github.com/rxvision/rxvision/acl"
)

// Route is a row of the table for tests.
type Route struct {
	Method, Pattern, Place string
	AnyOf                  [][]acl.Capability
}

var placeNames = map[place]string{
	open: "open", own: "own", visible: "visible", region: "region", ofRequest: "request", someplace: "someplace",
	ofAlloc: "alloc", ofEval: "eval", ofDeployment: "deployment", ofPool: "pool", ofModel: "model",
	ofArtifact: "artifact", ofVariable: "variable", ofNamespace: "namespace", ofBody: "body",
}

// Routes lists the whole table.
func Routes() []Route {
	var out []Route
	for _, r := range routes {
		out = append(out, Route{r.method, r.pattern, placeNames[r.access.at], r.access.anyOf})
	}
	return out
}

func (r Route) String() string {
	method := r.Method
	if method == "" {
		method = "any"
	}
	var sets []string
	for _, set := range r.AnyOf {
		var caps []string
		for _, c := range set {
			caps = append(caps, string(c))
		}
		sets = append(sets, strings.Join(caps, "+"))
	}
	return strings.TrimSpace(fmt.Sprintf("%-6s %s %s %s", method, r.Pattern, r.Place, strings.Join(sets, "|")))
}
