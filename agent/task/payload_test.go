package task

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWritePayload(t *testing.T) {
	dir := AllocDir(t.TempDir()).Task("t")
	if err := dir.Build(""); err != nil {
		t.Fatal(err)
	}
	for _, payload := range []string{"first", "again"} { // as after a start that was cut off
		if err := WritePayload(dir, "in/data.json", []byte(payload), ""); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir.Local(), "in", "data.json")
		got, err := os.ReadFile(path)
		if err != nil || string(got) != payload {
			t.Fatalf("%q, %v", got, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
	}
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir.Local(), "link")); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"../secrets/x", "/etc/x", "link/x", "", "."} {
		if err := WritePayload(dir, file, []byte("x"), ""); err == nil || !strings.Contains(err.Error(), "payload") {
			t.Errorf("%q: %v", file, err)
		}
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside lies %v, %v", left, err)
	}
	if err := WritePayload(dir, "x", []byte("x"), "no-such-user"); err == nil && os.Geteuid() == 0 {
		t.Error("an unknown user got a file")
	}
}
