package task

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

func TestArtifacts(t *testing.T) {
	const body = "the artifact"
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte(body)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/missing":
			http.NotFound(w, r)
		case r.URL.Path == "/private" && r.Header.Get("X-Key") != "t":
			w.WriteHeader(http.StatusForbidden)
		case r.URL.Path == "/cut":
			w.Header().Set("Content-Length", "1000")
			fmt.Fprint(w, body)
		default:
			fmt.Fprint(w, body)
		}
	}))
	defer server.Close()
	local := filepath.Join(t.TempDir(), "file.bin")
	if err := os.WriteFile(local, []byte(body), 0o644); err != nil {
		t.Fatal(err)
	}
	client := server.Client()
	opt := func(kv ...string) map[string]string { return map[string]string{kv[0]: kv[1]} }
	for _, c := range []struct {
		name  string
		block cluster.Artifact
		files bool
		max   int64
		at    string // below the task's directory
		fault string
	}{
		{name: "default place", block: cluster.Artifact{GetterSource: "/a.bin"}, at: "local/a.bin"},
		{name: "checksum", block: cluster.Artifact{GetterSource: "/a.bin", GetterOptions: opt("checksum", "sha256:"+sum)}, at: "local/a.bin"},
		{name: "directory", block: cluster.Artifact{GetterSource: "/a.bin", RelativeDest: "local/deep/er"}, at: "local/deep/er/a.bin"},
		{name: "as file", block: cluster.Artifact{GetterSource: "/x.tar.gz", GetterMode: "file", RelativeDest: "${NOMAD_TASK_DIR}/y"}, at: "local/y"},
		{name: "header", block: cluster.Artifact{GetterSource: "/private", GetterHeaders: opt("X-Key", "${NOMAD_TASK_NAME}")}, at: "local/private"},
		{name: "of the node", block: cluster.Artifact{GetterSource: "file://" + local}, files: true, at: "local/file.bin"},
		{
			name: "wrong sum", block: cluster.Artifact{GetterSource: "/a.bin", GetterOptions: opt("checksum", "sha256:"+strings.Repeat("0", 64))},
			fault: "expected sha256:" + strings.Repeat("0", 64) + ", got sha256:" + sum,
		},
		{name: "odd sum", block: cluster.Artifact{GetterSource: "/a.bin", GetterOptions: opt("checksum", "md5:00")}, fault: `checksum "md5:00" is not sha256`},
		{name: "too large", block: cluster.Artifact{GetterSource: "/a.bin"}, max: 5, fault: "limit of 5 bytes"},
		{name: "just fits", block: cluster.Artifact{GetterSource: "/a.bin"}, max: int64(len(body)), at: "local/a.bin"},
		{name: "missing", block: cluster.Artifact{GetterSource: "/missing"}, fault: "404"},
		{name: "cut short", block: cluster.Artifact{GetterSource: "/cut"}, fault: "unexpected EOF"},
		{name: "archive", block: cluster.Artifact{GetterSource: "/x.tar.gz"}, fault: "unpacking .tar.gz is not supported"},
		{name: "node's file", block: cluster.Artifact{GetterSource: "file://" + local}, fault: "may not be read"},
		{name: "git", block: cluster.Artifact{GetterSource: "git::https://x/y"}, fault: "not supported"},
		{name: "escape", block: cluster.Artifact{GetterSource: "/a.bin", RelativeDest: "../../x"}, fault: "leads out"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, dir := exampleEnv(t, &cluster.Task{Name: "t"})
			if strings.HasPrefix(c.block.GetterSource, "/") {
				c.block.GetterSource = server.URL + c.block.GetterSource
			}
			a := &Artifacts{MaxBytes: c.max, AllowFile: c.files, Client: client}
			err := a.Get(context.Background(), &c.block, dir, e)
			if c.fault != "" {
				if err == nil || !strings.Contains(err.Error(), c.fault) || !strings.Contains(err.Error(), "failed to download artifact") {
					t.Errorf("error %v, want one with %q", err, c.fault)
				}
				var left []string
				_ = filepath.WalkDir(dir.Root(), func(p string, d os.DirEntry, _ error) error {
					if d.Type().IsRegular() {
						left = append(left, p)
					}
					return nil
				})
				if left != nil {
					t.Errorf("left behind: %v", left)
				}
				return
			}
			got, readErr := os.ReadFile(filepath.Join(dir.Root(), c.at))
			if err != nil || readErr != nil || string(got) != body {
				t.Errorf("got %q, %v, %v", got, err, readErr)
			}
		})
	}
}
