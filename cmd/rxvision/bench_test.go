package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestInsist answers a call as a server under load does.
func TestInsist(t *testing.T) {
	busy := &refusal{http.StatusServiceUnavailable, 0, "this server lags behind"}
	for name, test := range map[string]struct {
		answers []error // the last one again and again
		calls   int
		atLeast time.Duration
		want    error
	}{
		"accepted at once":  {[]error{nil}, 1, 0, nil},
		"accepted later":    {[]error{busy, busy, nil}, 3, 2 * firstPause, nil},
		"told when":         {[]error{&refusal{http.StatusTooManyRequests, 7 * time.Second, "later"}, nil}, 2, 7 * time.Second, nil},
		"nobody leads":      {[]error{&refusal{http.StatusInternalServerError, 0, "No cluster leader"}, nil}, 2, firstPause, nil},
		"a fault of theirs": {[]error{&refusal{http.StatusInternalServerError, 0, "panic"}}, 1, 0, &refusal{}},
		"refused for good":  {[]error{busy, &refusal{http.StatusBadRequest, 0, "no job"}}, 2, firstPause, &refusal{}},
		"no answer":         {[]error{context.DeadlineExceeded}, 1, 0, context.DeadlineExceeded},
		"never":             {[]error{busy}, 65, patience - longPause, busy},
		"told to come late": {[]error{&refusal{http.StatusServiceUnavailable, time.Hour, "in an hour"}}, 1, 0, &refusal{}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				calls, began := 0, time.Now()
				err := insist(t.Context(), func() error {
					calls++
					return test.answers[min(calls, len(test.answers))-1]
				})
				var r *refusal
				if errors.As(test.want, &r) != errors.As(err, &r) || (err == nil) != (test.want == nil) {
					t.Errorf("ended with %v, want %v", err, test.want)
				}
				if calls != test.calls {
					t.Errorf("%d calls, want %d", calls, test.calls)
				}
				if took := time.Since(began); took < test.atLeast || took > patience {
					t.Errorf("took %s, want %s to %s", took, test.atLeast, patience)
				}
			})
		})
	}
}

// TestInsistEnds ends the wait with the context.
func TestInsistEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := insist(ctx, func() error { return &refusal{http.StatusServiceUnavailable, 0, "busy"} })
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "busy") {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestCallTellsRefusal reads status and Retry-After from a server's answer.
func TestCallTellsRefusal(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "3")
		http.Error(w, "busy", http.StatusServiceUnavailable)
	}))
	defer s.Close()
	p := &controlPlane{client: s.Client()}
	err := p.call(t.Context(), http.MethodPut, &benchServer{http: strings.TrimPrefix(s.URL, "https://")}, "/v1/jobs", "{}", nil)
	var r *refusal
	if !errors.As(err, &r) || r.status != http.StatusServiceUnavailable || r.after != 3*time.Second || !strings.Contains(r.Error(), "busy") {
		t.Errorf("the refusal is %+v", err)
	}
}

// TestArchivedAllocs counts what an archive holds before any server is started for it.
func TestArchivedAllocs(t *testing.T) {
	path, content := fixture(t)
	if n, err := archivedAllocs(path); err != nil || n == 0 {
		t.Errorf("%d allocations: %v", n, err)
	}
	content[len(content)/2] ^= 1
	bad := filepath.Join(t.TempDir(), "bad.snap")
	if err := os.WriteFile(bad, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{bad: "damaged", "no/such.snap": "no such file", "bench_test.go": "neither"} {
		code, out := runs(t, "bench", "control", "--part", "state", "--archive", path)
		if code != exitError || !strings.Contains(out, "--archive "+path) || !strings.Contains(out, want) {
			t.Errorf("code %d: %s", code, out)
		}
	}
}

// TestBootstrapAgain takes the management of a region whose token nobody here has.
func TestBootstrapAgain(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "s1"), 0o700); err != nil {
		t.Fatal(err)
	}
	reset := bootstrapReset(filepath.Join(dir, "s1", bootstrapResetFile), slog.New(slog.DiscardHandler))
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Nomad-Token") != "" || reset() != 17 {
			http.Error(w, "ACL bootstrap already done (reset index: 17)", http.StatusBadRequest)
			return
		}
		fmt.Fprint(w, `{"SecretID":"new"}`)
	}))
	defer s.Close()
	p := &controlPlane{dir: dir, client: s.Client(), token: "old", servers: []*benchServer{{name: "s1", http: strings.TrimPrefix(s.URL, "https://")}}}
	if err := p.bootstrap(t.Context()); err != nil || p.token != "new" {
		t.Errorf("token %q: %v", p.token, err)
	}
}
