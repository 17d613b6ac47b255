package main

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/pki"
)

// rx runs a command line and gives its exit code and output.
func rx(t *testing.T, args ...string) (code int, out, errOut string) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(t.Context(), args, &o, &e)
	return code, o.String(), e.String()
}

func TestTLSCommands(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	good := func(args ...string) string {
		t.Helper()
		code, out, errOut := rx(t, args...)
		if code != exitOK {
			t.Fatalf("%v: exit %d: %s", args, code, errOut)
		}
		return out
	}
	bad := func(want []string, args ...string) {
		t.Helper()
		code, _, errOut := rx(t, args...)
		if code != exitError {
			t.Errorf("%v: exit %d", args, code)
		}
		for _, text := range want {
			if !strings.Contains(errOut, text) {
				t.Errorf("%v: %q is not in:\n%s", args, text, errOut)
			}
		}
	}
	bad([]string{"Make a CA with `rxvision tls ca create`"}, "tls", "cert", "create", "-server", "-name", "s1")
	bad([]string{`region "A.B"`, "--days 0"}, "tls", "ca", "create", "-region", "A.B", "-days", "0")
	out := good("tls", "ca", "create", "-region", "eu", "-days", "30")
	for name, mode := range map[string]os.FileMode{caFile: 0o644, caKeyFile: 0o600, nodeCAFile: 0o644, nodeCAKeyFile: 0o600} {
		info, err := os.Stat(name)
		if err != nil || info.Mode().Perm() != mode || !strings.Contains(out, "Saved "+name) {
			t.Errorf("%s: mode %v, want %v (%v)", name, info.Mode().Perm(), mode, err)
		}
	}
	before, err := os.ReadFile(caKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	bad([]string{"ca.pem exists already", "node-ca-key.pem exists already"}, "tls", "ca", "create")
	if after, err := os.ReadFile(caKeyFile); err != nil || !bytes.Equal(before, after) {
		t.Error("the CA's key was overwritten")
	}
	good("tls", "cert", "create", "-server", "-name", "s1", "-additional-dns", "s1.example.com", "-additional-ip", "10.0.0.1", "-days", "10")
	good("tls", "cert", "create", "-gateway", "-name", "g1")
	good("tls", "cert", "create", "-client", "-name", "alice")
	good("tls", "node-ca", "create", "-dir", t.TempDir())
	bad([]string{"s1.pem exists already"}, "tls", "cert", "create", "-server", "-name", "s1")
	bad([]string{"exactly one of --server, --gateway and --client", "--name is missing", `--additional-ip "x"`, `--additional-dns "10.0.0.1"`, "--days -1"},
		"tls", "cert", "create", "-additional-ip", "x", "-additional-dns", "10.0.0.1", "-days", "-1")
	bad([]string{"exactly one of"}, "tls", "cert", "create", "-server", "-client", "-name", "x")
	bad([]string{"are for certificates that serve HTTPS"}, "tls", "cert", "create", "-client", "-name", "x", "-additional-ip", "10.0.0.1")
	bad([]string{`name "../x"`}, "tls", "cert", "create", "-server", "-name", "../x")
	bad([]string{"is a node CA"}, "tls", "cert", "create", "-server", "-name", "x", "-ca", nodeCAFile, "-key", nodeCAKeyFile)
	bad([]string{"is not the key of"}, "tls", "cert", "create", "-server", "-name", "x", "-key", nodeCAKeyFile)

	for name, want := range map[string]pki.Identity{
		"s1": {Role: pki.RoleServer, Region: "eu", Name: "s1"}, "g1": {Role: pki.RoleGateway, Region: "eu", Name: "g1"}, "alice": {Role: pki.RoleOperator, Region: "eu", Name: "alice"},
	} {
		m, err := pki.Load(pki.Config{CA: caFile, Cert: name + ".pem", Key: name + "-key.pem", Region: "eu", Role: want.Role})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if m.Identity() != want {
			t.Errorf("%s is %s", name, m.Identity())
		}
	}
	certs, err := pki.ReadCerts("s1.pem")
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"localhost", "127.0.0.1", "server.eu.rxvision", "s1.example.com", "10.0.0.1"} {
		if err := certs[0].VerifyHostname(host); err != nil {
			t.Errorf("HTTPS to %s: %v", host, err)
		}
	}
	if left := time.Until(certs[0].NotAfter); left > 10*day || left < 9*day {
		t.Errorf("it lives for %s", left)
	}
}

func TestIntroTokenSources(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	write := func(text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(i identityFlags, token, fault string) {
		t.Helper()
		got, err := i.token()
		if got != token || (err == nil) != (fault == "") || err != nil && !strings.Contains(err.Error(), fault) {
			t.Errorf("%+v: %q, %v; want %q, %q", i, got, err, token, fault)
		}
	}
	t.Setenv(introTokenEnv, "")
	expect(identityFlags{}, "", "rxvision node intro")
	t.Setenv(introTokenEnv, " rxi-env\n")
	expect(identityFlags{}, "rxi-env", "")
	file := identityFlags{tokenFile: path}
	expect(file, "", "no such file")
	write("rxi-file\n", 0o600)
	expect(file, "rxi-file", "")
	write("rxi-other", 0o600) // whoever runs the host may bring another one
	expect(file, "rxi-other", "")
	write("rxi-open", 0o644)
	expect(file, "", "chmod 600")
	write("\n", 0o600)
	expect(file, "", "is empty")
	write(strings.Repeat("x", maxTokenFile+1), 0o600)
	expect(file, "", "no file of at most")
	for _, cmd := range newRoot().Commands() {
		if f := cmd.Flags().Lookup("intro-token"); f != nil {
			t.Errorf("%s takes a token on its command line", cmd.Name())
		}
	}
}

func TestPlainTextStaysOnLoopback(t *testing.T) {
	for _, args := range [][]string{
		{"agent", "-server", "10.0.0.1:7647", "-data-dir", t.TempDir()},
		{"agent", "-address", "10.0.0.1", "-data-dir", t.TempDir()},
		{"gateway", "-server", "10.0.0.1:7647", "-data-dir", t.TempDir()},
		{"gateway", "-http-addr", "0.0.0.0:8080", "-data-dir", t.TempDir()},
		{"worker", "-file", "x", "-listen", "0.0.0.0:8000"},
	} {
		if code, _, errOut := rx(t, args...); code != exitError || !strings.Contains(errOut, "plain text is for loopback") {
			t.Errorf("%v: exit %d: %s", args, code, errOut)
		}
	}
	for _, c := range []struct {
		want string
		args []string
	}{
		{"no.pem", []string{"agent", "-ca", "no.pem", "-http-addr", "127.0.0.1:0", "-data-dir", t.TempDir()}},
		{"need --tls-ca", []string{"gateway", "-tls-cert", "x", "-data-dir", t.TempDir()}},
		{"--tls-node is missing", []string{"worker", "-file", "x", "-tls-cert", "x"}},
		{"no.pem", []string{"gateway", "-http-tls-cert", "no.pem", "-http-addr", "0.0.0.0:0", "-data-dir", t.TempDir()}},
	} {
		if code, _, errOut := rx(t, c.args...); code != exitError || !strings.Contains(errOut, c.want) {
			t.Errorf("%v: exit %d: %s", c.args, code, errOut)
		}
	}
}

// TestWorkerCallers is who a worker lets in: gateways, and its own agent also for some time after its certificate expired.
func TestWorkerCallers(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	ca, err := pki.NewCA("global", 20*day, now.Add(-10*day))
	if err != nil {
		t.Fatal(err)
	}
	node, err := ca.NewNodeCA(20*day, now.Add(-10*day))
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := pki.Create(path, content, pki.ModeKey); err != nil {
			t.Fatal(err)
		}
		return path
	}
	made := 0
	issue := func(role pki.Role, name string, expires time.Duration) tls.Certificate {
		t.Helper()
		made++
		key, err := pki.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		chain, err := node.Issue(pki.Identity{Role: role, Region: "global", Name: name}, pki.Names{}, key.Public(), day, now.Add(expires-day))
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: chain, PrivateKey: key}
	}
	own := issue(pki.RoleWorker, "alloc", time.Hour)
	text, err := pki.EncodeKey(own.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	w := workerIdentity{ca: file("ca.pem", ca.CertPEM()), cert: file("w.pem", pki.EncodeChain(own.Certificate)), key: file("w-key.pem", text), node: "n1"}
	m, err := w.open(slog.New(slog.DiscardHandler), newMetrics())
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		Handler:  http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") }),
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(tls.NewListener(l, m.Server(w.callers()))) }()
	defer func() { srv.Close(); <-done }()
	for who, c := range map[string]struct {
		cert tls.Certificate
		ok   bool
	}{
		"a gateway":                         {issue(pki.RoleGateway, "g1", time.Hour), true},
		"an expired gateway":                {issue(pki.RoleGateway, "g1", -time.Hour), false},
		"its agent":                         {issue(pki.RoleNode, "n1", time.Hour), true},
		"its agent, cut off for two days":   {issue(pki.RoleNode, "n1", -2*day), true},
		"its agent, cut off for eight days": {issue(pki.RoleNode, "n1", -8*day), false},
		"another agent":                     {issue(pki.RoleNode, "n2", time.Hour), false},
		"another worker":                    {issue(pki.RoleWorker, "other", time.Hour), false},
	} {
		cfg := m.Anonymous(pki.Exactly(pki.RoleWorker, "alloc"))
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c.cert, nil }
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}}
		resp, err := client.Get("https://" + l.Addr().String())
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", who, err)
		}
	}
}
