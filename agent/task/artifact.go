package task

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Bounds of an artifact download.
const (
	// DefaultMaxArtifact is the largest artifact when Artifacts.MaxBytes is 0.
	DefaultMaxArtifact = 16 << 30
	artifactTimeout    = 30 * time.Minute
)

// Artifacts fetches artifact blocks over http, https and, where allowed, file.
type Artifacts struct {
	MaxBytes  int64        // largest file; 0: DefaultMaxArtifact
	AllowFile bool         // file:// reads with the agent's rights: only where jobs may run any command anyway
	Client    *http.Client // nil: http.DefaultClient
}

// Get fetches one artifact into the task's directory and verifies its checksum.
// A file that fails is not left behind.
func (a *Artifacts) Get(ctx context.Context, block *cluster.Artifact, dir Dir, e *Env) error {
	source := e.Expand(block.GetterSource)
	if err := a.get(ctx, source, block, dir, e); err != nil {
		return fmt.Errorf("failed to download artifact %q: %w", source, err)
	}
	return nil
}

func (a *Artifacts) get(ctx context.Context, source string, block *cluster.Artifact, dir Dir, e *Env) error {
	u, err := url.Parse(source)
	if err != nil {
		return err
	}
	want, err := checkOptions(block, u, e)
	if err != nil {
		return err
	}
	dest := e.Expand(block.RelativeDest)
	if dest == "" {
		dest = localName
	}
	if block.GetterMode != "file" {
		name := path.Base(u.Path)
		if name == "." || name == "/" {
			return errors.New(`the URL names no file: set mode = "file" and a destination`)
		}
		dest = filepath.Join(dest, name)
	}
	rel, err := dir.rel(dest)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, artifactTimeout)
	defer cancel()
	body, err := a.open(ctx, u, block.GetterHeaders, e)
	if err != nil {
		return err
	}
	defer body.Close()
	root, err := os.OpenRoot(dir.Root())
	if err != nil {
		return err
	}
	defer root.Close()
	return a.save(root, rel, body, want)
}

// checkOptions returns the wanted SHA-256 in hex, "" for any, and refuses what is
// asked for but not built.
func checkOptions(block *cluster.Artifact, u *url.URL, e *Env) (want string, err error) {
	switch u.Scheme {
	case "http", "https", "file", "":
	default:
		return "", fmt.Errorf("scheme %q is not supported; http, https and file are", u.Scheme)
	}
	archive := true
	for k, v := range block.GetterOptions {
		switch v = e.Expand(v); k {
		case "checksum":
			sum, ok := strings.CutPrefix(v, "sha256:")
			if b, err := hex.DecodeString(sum); !ok || err != nil || len(b) != sha256.Size {
				return "", fmt.Errorf("checksum %q is not sha256: and 64 hex digits", v)
			}
			want = strings.ToLower(sum)
		case "archive":
			archive = v != "false" && v != "0"
		default:
			return "", fmt.Errorf("option %q is not supported; checksum and archive are", k)
		}
	}
	switch block.GetterMode {
	case "", "any", "file":
	default:
		return "", fmt.Errorf("mode %q is not supported; any and file are", block.GetterMode)
	}
	if block.GetterInsecure {
		return "", errors.New("insecure is not supported")
	}
	if block.GetterMode != "file" && archive {
		for _, ext := range []string{".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz", ".tar.zst", ".zip", ".gz", ".bz2", ".xz", ".zst"} {
			if strings.HasSuffix(u.Path, ext) {
				return "", fmt.Errorf(`unpacking %s is not supported: set mode = "file" or options { archive = false }`, ext)
			}
		}
	}
	return want, nil
}

func (a *Artifacts) open(ctx context.Context, u *url.URL, headers map[string]string, e *Env) (io.ReadCloser, error) {
	if u.Scheme == "file" || u.Scheme == "" {
		if !a.AllowFile {
			return nil, errors.New("files of the node may not be read: use http(s), or enable raw_exec on the agent")
		}
		f, err := os.Open(u.Path)
		if err != nil {
			return nil, err
		}
		if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
			return nil, errors.Join(err, f.Close(), errors.New("not a regular file"))
		}
		return f, nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for k, v := range headers {
		req.Header.Set(k, e.Expand(v))
	}
	client := a.Client
	if client == nil {
		client = http.DefaultClient
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("the server answered %s", resp.Status)
	}
	return resp.Body, nil
}

// save writes body to rel, complete and with the right sum, or not at all.
func (a *Artifacts) save(root *os.Root, rel string, body io.Reader, want string) (err error) {
	limit := a.MaxBytes
	if limit == 0 {
		limit = DefaultMaxArtifact
	}
	if err := root.MkdirAll(filepath.Dir(rel), 0o777); err != nil {
		return err
	}
	partial := rel + ".partial"
	f, err := root.OpenFile(partial, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = root.Remove(partial)
		}
	}()
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, sum), io.LimitReader(body, limit+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if n > limit {
		return fmt.Errorf("larger than the limit of %d bytes", limit)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); want != "" && got != want {
		return fmt.Errorf("checksums did not match: expected sha256:%s, got sha256:%s", want, got)
	}
	return root.Rename(partial, rel)
}
