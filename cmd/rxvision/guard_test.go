package main

import (
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestGuard(t *testing.T) {
	reached := false
	h := guard(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }), "127.0.0.1:7646",
		func(w http.ResponseWriter, why string) { http.Error(w, why, http.StatusForbidden) })
	for _, c := range []struct {
		what, method, host string
		header             map[string]string
		passes             bool
	}{
		{"the command line", "PUT", "127.0.0.1:7646", nil, true},
		{"by name", "POST", "localhost:7646", nil, true},
		{"through a tunnel", "GET", "LocalHost:1234", nil, true},
		{"IPv6", "PUT", "[::1]:7646", nil, true},
		{"without a port", "PUT", "127.0.0.1", nil, true},
		{"a page of this server", "POST", "127.0.0.1:7646", map[string]string{"Origin": "http://127.0.0.1:7646", "Sec-Fetch-Site": "same-origin"}, true},
		{"a foreign page", "POST", "127.0.0.1:7646", map[string]string{"Origin": "https://evil.example"}, false},
		{"a foreign page, newer browser", "POST", "127.0.0.1:7646", map[string]string{"Sec-Fetch-Site": "cross-site"}, false},
		{"a sandboxed page", "PUT", "127.0.0.1:7646", map[string]string{"Origin": "null"}, false},
		{"a page of another local port", "DELETE", "localhost:7646", map[string]string{"Origin": "http://localhost:3000"}, false},
		{"a rebound name", "GET", "evil.example:7646", nil, false},
		{"a rebound name and its own origin", "POST", "evil.example:7646", map[string]string{"Origin": "http://evil.example:7646", "Sec-Fetch-Site": "same-origin"}, false},
	} {
		reached = false
		r := httptest.NewRequest(c.method, "/v1/jobs", nil)
		r.Host = c.host
		for k, v := range c.header {
			r.Header.Set(k, v)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if reached != c.passes || !c.passes && w.Code != http.StatusForbidden {
			t.Errorf("%s: reached %v, status %d", c.what, reached, w.Code)
		}
	}
}
