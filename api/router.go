package api

import (
	"fmt"
	"net/http"
	"strings"
)

// route is one line of the table. Its pattern is matched against the decoded
// path: `:name` stands for one step that is not empty, `*name` for one or more of
// which the first is not, so that the IDs of jobs may hold slashes. Of two routes that match, the first counts.
type route struct {
	method  string // PUT takes POST too, as Nomad does
	pattern string
	access  access // who may
	handle  func(*Server, *request) (any, error)

	steps []string
}

// router finds routes by the first steps of a path, /v1/X.
type router map[string][]*route

func newRouter(table []route) router {
	rt := router{}
	for i := range table {
		r := &table[i]
		r.steps = strings.Split(r.pattern, "/")
		rt[group(r.steps)] = append(rt[group(r.steps)], r)
	}
	return rt
}

// group is what routes are looked up by: the step after /v1.
func group(steps []string) string {
	if len(steps) > 2 && steps[1] == "v1" {
		return steps[2]
	}
	return ""
}

// find gives the route of a request and its parameters.
func (rt router) find(method, path string) (*route, map[string]string, error) {
	asked := method
	if method == http.MethodPost {
		method = http.MethodPut
	}
	steps := strings.Split(path, "/")
	var known *route // the first that matches; only others of its pattern are meant too
	for _, r := range rt[group(steps)] {
		params, ok := match(r.steps, steps)
		if !ok || known != nil && r.pattern != known.pattern {
			continue
		}
		if r.method == method || r.method == anyMethod {
			return r, params, nil
		}
		known = r
	}
	if known != nil {
		return nil, nil, errMethod
	}
	return nil, nil, &statusError{http.StatusNotFound, fmt.Errorf("no such call: %s %s", asked, clip(path))}
}

// clip bounds what an answer repeats of a request.
func clip(s string) string {
	const most = 200 // bytes
	if len(s) > most {
		s = s[:most] + "…"
	}
	return s
}

// match compares a pattern with a path, both split at slashes.
func match(pattern, steps []string) (map[string]string, bool) {
	var params map[string]string
	set := func(name, value string) {
		if params == nil {
			params = map[string]string{}
		}
		params[name] = value
	}
	for i, p := range pattern {
		if strings.HasPrefix(p, "*") {
			rest := pattern[i+1:]
			n := len(steps) - i - len(rest) // steps that the star takes
			if n < 1 || steps[i] == "" {
				return nil, false
			}
			tail, ok := match(rest, steps[i+n:])
			if !ok {
				return nil, false
			}
			set(p[1:], strings.Join(steps[i:i+n], "/"))
			for name, value := range tail {
				set(name, value)
			}
			return params, true
		}
		if i >= len(steps) {
			return nil, false
		}
		switch {
		case strings.HasPrefix(p, ":"):
			if steps[i] == "" {
				return nil, false
			}
			set(p[1:], steps[i])
		case p != steps[i]:
			return nil, false
		}
	}
	return params, len(pattern) == len(steps)
}
