package main

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/pki"
)

// clientFlags are what every command that asks a server has.
type clientFlags struct {
	address string
	ca      string
	json    bool
}

func (c *clientFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&c.address, "address", "", "the server's HTTP API; default: NOMAD_ADDR, then http://"+defaultHTTPAddr)
	cmd.Flags().StringVar(&c.ca, "ca-cert", "", "PEM file of the CA that signed the server's certificate; default: NOMAD_CACERT, then the system's")
	cmd.Flags().BoolVar(&c.json, "json", false, "print JSON")
}

func (c *clientFlags) client() (*api.Client, error) {
	var trusting *http.Client
	if ca := cmp.Or(c.ca, os.Getenv("NOMAD_CACERT")); ca != "" {
		certs, err := pki.ReadCerts(ca)
		if err != nil {
			return nil, fmt.Errorf("--ca-cert: %w", err)
		}
		pool := x509.NewCertPool()
		for _, cert := range certs {
			pool.AddCert(cert)
		}
		trusting = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, Proxy: http.ProxyFromEnvironment}}
	}
	return api.NewClient(cmp.Or(c.address, os.Getenv("NOMAD_ADDR"), "http://"+defaultHTTPAddr), os.Getenv("NOMAD_TOKEN"), trusting)
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// table prints rows under a heading, columns aligned.
func table(w io.Writer, heading string, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	if _, err := fmt.Fprintln(t, strings.ReplaceAll(heading, "|", "\t")); err != nil {
		return err
	}
	for _, r := range rows {
		if _, err := fmt.Fprintln(t, strings.Join(r, "\t")); err != nil {
			return err
		}
	}
	return t.Flush()
}

func short(id string) string { return id[:min(8, len(id))] }

// bytesText renders a size for people.
func bytesText(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}

func timeText(nanos int64) string {
	if nanos == 0 {
		return "-"
	}
	return time.Unix(0, nanos).UTC().Format("2006-01-02 15:04:05")
}

// bar draws how much of a long work is done; it writes only to terminals.
type bar struct {
	w      io.Writer
	what   string
	amount func(total int64) string
	last   time.Time
}

// newBar is a bar of bytes.
func newBar(w io.Writer, what string) *bar { return &bar{w: w, what: what, amount: bytesText} }

func (b *bar) set(done, total int64) {
	if !isTerminal(b.w) || total <= 0 || (done < total && time.Since(b.last) < 50*time.Millisecond) {
		return
	}
	b.last = time.Now()
	const width = 30
	full := int(width * done / total)
	fmt.Fprintf(b.w, "\r%s [%s%s] %3d%% %s", b.what, strings.Repeat("#", full), strings.Repeat(".", width-full), 100*done/total, b.amount(total))
	if done >= total {
		fmt.Fprintln(b.w)
	}
}
