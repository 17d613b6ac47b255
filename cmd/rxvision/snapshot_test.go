package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// runs executes a command line and gives its exit code and output.
func runs(t *testing.T, args ...string) (code int, out string) {
	t.Helper()
	var b bytes.Buffer
	code = run(t.Context(), args, &b, &b)
	return code, b.String()
}

func fixture(t *testing.T) (path string, content []byte) {
	t.Helper()
	names, err := filepath.Glob("../../raftstore/testdata/releases/*/archive.snap")
	if err != nil || len(names) == 0 {
		t.Fatalf("no archives: %v", err)
	}
	b, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	return names[0], b
}

func TestSnapshotInspect(t *testing.T) {
	path, content := fixture(t)
	if code, out := runs(t, "snapshot", "inspect", path); code != exitOK || !strings.Contains(out, "Verdict  sound") || !strings.Contains(out, "allocs") {
		t.Errorf("code %d\n%s", code, out)
	}
	if code, out := runs(t, "snapshot", "inspect", "-json", path); code != exitOK || !strings.Contains(out, `"Sound": true`) {
		t.Errorf("code %d\n%s", code, out)
	}
	bad := filepath.Join(t.TempDir(), "bad.snap")
	content[len(content)/2] ^= 1
	if err := os.WriteFile(bad, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out := runs(t, "snapshot", "inspect", bad); code != exitError || !strings.Contains(out, "cannot be restored: snapshot archive is damaged") || strings.Contains(out, "total") {
		t.Errorf("code %d\n%s", code, out)
	}
}

// Save and restore speak to a server; what is damaged on the way, or before, is refused.
func TestSnapshotSaveAndRestore(t *testing.T) {
	path, content := fixture(t)
	sum := sha256.Sum256(content)
	digest := "sha-256=" + base64.StdEncoding.EncodeToString(sum[:])
	var damage bool
	var got []byte
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path != "/v1/operator/snapshot":
			http.NotFound(w, r)
		case r.Method == http.MethodPut:
			b, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			got = b
		default:
			b := bytes.Clone(content)
			if damage {
				b[len(b)-1] ^= 1
			}
			w.Header().Set("Digest", digest)
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
			_, _ = w.Write(b)
		}
	}))
	defer server.Close()
	dir := t.TempDir()
	saved := filepath.Join(dir, "a.snap")
	if code, out := runs(t, "snapshot", "save", "-address", server.URL, saved); code != exitOK || !strings.Contains(out, "verified") {
		t.Fatalf("code %d\n%s", code, out)
	}
	if b, err := os.ReadFile(saved); err != nil || !bytes.Equal(b, content) {
		t.Errorf("saved other bytes, %v", err)
	}
	if code, out := runs(t, "snapshot", "save", "-address", server.URL, saved); code != exitError || !strings.Contains(out, "is there already") {
		t.Errorf("twice: code %d\n%s", code, out)
	}
	damage = true
	if code, out := runs(t, "snapshot", "save", "-address", server.URL, filepath.Join(dir, "b.snap")); code != exitError || !strings.Contains(out, "damaged on its way") {
		t.Errorf("damaged on its way: code %d\n%s", code, out)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left %v, %v", left, err)
	}
	if code, out := runs(t, "snapshot", "restore", "-address", server.URL, path); code != exitOK || !bytes.Equal(got, content) {
		t.Errorf("restore: code %d\n%s", code, out)
	}
	got = nil
	bad := filepath.Join(dir, "bad.snap")
	if err := os.WriteFile(bad, content[:len(content)-3], 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out := runs(t, "snapshot", "restore", "-address", server.URL, bad); code != exitError || got != nil || !strings.Contains(out, "cut short") {
		t.Errorf("restore of a damaged one: code %d, %d bytes sent\n%s", code, len(got), out)
	}
}

func TestServerRebuildRefusesAFolderWithoutServer(t *testing.T) {
	if code, out := runs(t, "server", "rebuild", "-data-dir", t.TempDir()); code != exitError || !strings.Contains(out, "holds no server") {
		t.Errorf("code %d\n%s", code, out)
	}
}
