package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestServerTellsAllFaults makes one mistake in each setting that is checked.
func TestServerTellsAllFaults(t *testing.T) {
	cmd := newServer()
	args := []string{
		"--name", "", "--log-level", "loud", "--job-gc-interval", "-5m", "--rpc-addr", "127.0.0.1:port", "--retry-join", "s2:raft",
		"--bootstrap-expect", "4", "--region", "no/region", "--retry-join", "s1", "--http-addr", "0.0.0.0:7646",
		"--raft-advertise", "nonsense", "--node-gc-threshold", "0s", "--tls-cert", "s1.pem",
	}
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	err := cmd.PersistentPreRunE(cmd, nil)
	if err == nil {
		t.Fatal("a server with every setting wrong started")
	}
	for _, want := range []string{
		"--bootstrap-expect 4", "--region", `--retry-join "s1"`, "--http-advertise is needed", `--raft-advertise "nonsense"`,
		"--name is needed", `--log-level "loud"`, "--job-gc-interval -5m", "--node-gc-threshold 0s", `"port" is no port`, `--retry-join "s2:raft"`,
		"--tls-ca is needed", "--tls-key is needed", "--node-ca-cert is needed", "--node-ca-key is needed",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("not told: %s", want)
		}
	}
	for _, fine := range []string{"--tls-cert is needed", "--eval-gc-threshold"} {
		if strings.Contains(err.Error(), fine) {
			t.Errorf("told as a fault: %s", fine)
		}
	}
	if t.Failed() {
		t.Log(err)
	}
}

// TestServerTellsFaultsOfFilesToo has faults in the configuration's form, in its
// values and in the files that it names.
func TestServerTellsFaultsOfFilesToo(t *testing.T) {
	dir := t.TempDir()
	file, ca := filepath.Join(dir, "s1.hcl"), filepath.Join(dir, "ca.pem")
	conf := `http_adr = "10.0.0.1:7646"
data_dir = ["a", "b"]
bootstrap_expect = 2
tls {
  ca   = "` + ca + `"
  cert = "nowhere.pem"
  key  = "nowhere-key.pem"
}
node_ca {
  cert = "node-ca.pem"
  key  = "node-ca-key.pem"
}
`
	for name, text := range map[string]string{file: conf, ca: "no PEM"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := newServer()
	if err := cmd.ParseFlags([]string{"--config", file}); err != nil {
		t.Fatal(err)
	}
	err := cmd.PersistentPreRunE(cmd, nil)
	if err == nil {
		t.Fatal("a server started with every setting wrong")
	}
	for _, want := range []string{`no setting "http_adr"`, "data_dir: a tuple does not fit", "--bootstrap-expect 2", "ca.pem holds no PEM", "nowhere.pem", "nowhere-key.pem"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("not told: %s", want)
		}
	}
	if t.Failed() {
		t.Log(err)
	}
}

// TestServerReloadsUnchanged reloads a configuration that nobody has changed.
func TestServerReloadsUnchanged(t *testing.T) {
	file := writeConfig(t, "s1.hcl", `dev = true
http_addr = "127.0.0.1:1"
`)
	cmd := newServer()
	if err := cmd.ParseFlags([]string{"--config", file}); err != nil {
		t.Fatal(err)
	}
	if err := cmd.PersistentPreRunE(cmd, nil); err != nil {
		t.Fatal(err)
	}
	var told strings.Builder
	r := &reload{cmd: cmd, fresh: newServer, log: slog.New(slog.NewTextHandler(&told, nil)), apply: func(name, _ string) error {
		t.Errorf("%s was reloaded", name)
		return nil
	}}
	if err := r.once(); err != nil || told.Len() > 0 {
		t.Errorf("reloaded: %v, %s", err, &told)
	}
}

// TestPlainServerStaysOnLoopback holds --dev to addresses of this machine.
func TestPlainServerStaysOnLoopback(t *testing.T) {
	cmd := newServer()
	if err := cmd.ParseFlags([]string{"--dev", "--rpc-addr", "10.0.0.1:7647"}); err != nil {
		t.Fatal(err)
	}
	if err := cmd.PersistentPreRunE(cmd, nil); err == nil || !strings.Contains(err.Error(), "--rpc-addr") {
		t.Errorf("a plain server on 10.0.0.1: %v", err)
	}
}

// failing is a store that has failed.
type failing chan error

func (f failing) Fatal() <-chan error { return f }

// TestServerEndsWithItsStore has a store fail under a server that ends by itself, and
// under one that a dead disk holds.
func TestServerEndsWithItsStore(t *testing.T) {
	reason := errors.New("the disk is broken")
	for what, c := range map[string]struct {
		limit time.Duration
		hangs bool
	}{"ends": {time.Hour, false}, "hangs": {time.Millisecond, true}} {
		store := failing(make(chan error, 1))
		store <- reason
		release, ended := make(chan struct{}), make(chan struct{})
		err := whileSound(t.Context(), store, c.limit, func(ctx context.Context) error {
			defer close(ended)
			<-ctx.Done()
			if c.hangs {
				<-release
			}
			return reason
		})
		if !errors.Is(err, reason) || strings.Count(err.Error(), reason.Error()) != 1 || strings.Contains(err.Error(), "not everything ended") != c.hangs {
			t.Errorf("%s: %v", what, err)
		}
		close(release)
		<-ended
	}
	fault := errors.New("the address is in use")
	if err := whileSound(t.Context(), failing(nil), time.Hour, func(context.Context) error { return fault }); !errors.Is(err, fault) {
		t.Errorf("without a failure: %v", err)
	}
}
